"""Coupled channels of the configs' models: masked equals cut, and counts are MMEngine's."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.model import revert_sync_batchnorm
from torch import nn

from mmsmart import install_masks
from mmsmart.cost import count_positions
from mmsmart.engine.export import load_model, read_config
from mmsmart.engine.raw_forward import RawForward
from mmsmart.importance import magnitude
from mmsmart.report import pruning_report
from mmsmart.shrink import cut_channels, shrink, structure_of

CONFIGS = Path(__file__).parents[2] / 'configs'

# Config, the budget's resource, channels in lots of.
EVERY_DAY = [
    ('mmpretrain/mobilenet-v2_8xb32_in1k_smart', 'macs', 8),
    ('mmdet/yolox_tiny_8xb8-300e_coco_smart', 'params', 1),
    ('mmseg/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024_smart', 'macs', 1),
]
SLOW = [
    ('mmpretrain/resnet50_8xb32_in1k_smart', 'params', 8),
    ('mmdet/retinanet_r18_fpn_1x_coco_smart', 'macs', 4),
    ('mmdet/mask-rcnn_r50_fpn_1x_coco_smart', 'macs', 8),
    ('mmseg/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024_smart', 'params', 2),
    *((name, {'macs': 'params', 'params': 'macs'}[r], 9 - lot) for name, r, lot in EVERY_DAY),
]
MODELS = [*EVERY_DAY, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
# What MMEngine calls convolutions and linear layers.
WEIGHTED = ('conv', 'linear', 'addmm')


def built(name):
    """A model in training, whose norms hide nothing by a weight of zero or fresh statistics."""
    if name.startswith('mmdet'):
        pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    generator = torch.Generator().manual_seed(1)

    def uniform(like, low):
        return torch.rand(like.shape, generator=generator) + low

    torch.manual_seed(0)
    model = revert_sync_batchnorm(load_model(read_config(CONFIGS / f'{name}.py')))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight.data, 0.5), (module.bias.data, -0.5),
                (module.running_mean, -0.5), (module.running_var, 0.5),
            ):  # fmt: skip
                tensor.copy_(uniform(tensor, low))
    return model.train()


def image():
    return torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def everything(model):
    return list(RawForward(model, auxiliary=True)(image()))


def by_mmengine(model):
    """MACs of convolutions and linear layers in a prediction, as MMEngine traces them."""
    analyser = FlopAnalyzer(RawForward(model), (image(),))
    analyser.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyser.tracer_warnings('none')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = analyser.by_operator()
    return sum(found[name] for name in WEIGHTED)


@pytest.mark.parametrize(('name', 'resource', 'round_to'), MODELS)
def test_half_of_a_model_is_cut_as_it_is_masked_and_counted(name, resource, round_to):
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    model = built(name)
    positions = count_positions(model.eval(), lambda: RawForward(model)(image()))
    counted = positions if resource == 'macs' else None
    masks = install_masks(
        model.train(), 0.5, 'channel', positions=counted, forward=everything, round_to=round_to
    )
    masks.begin(masks.plan.first(magnitude(masks.layers)), 1.0)
    assert masks.soft_sparsity() == pytest.approx(0.5, abs=1e-6)
    masks.harden()
    model.eval()

    kept = masks.plan.kept_channels(masks.hard_mask().bool())
    cut = copy.deepcopy(model)
    cut_channels(cut, kept)
    with torch.no_grad():
        for mine, its in zip(everything(model), everything(cut), strict=True):
            assert mine.shape == its.shape
            assert float((mine - its).abs().max()) <= 1e-4 * float(mine.abs().max())

    report = pruning_report(model, masks, positions, 'smart', {}, {})
    assert report['kept'] <= report['budget'] < report['kept'] + report['next_block_cost']
    assert report['kept'] == sum(row[f'{resource}_kept'] for row in report['layers'])
    assert report['pruned']['params'] == sum(p.numel() for p in cut.parameters())
    assert report['dense']['macs'] == by_mmengine(model)
    assert report['pruned']['macs'] == by_mmengine(cut)
    for group in report['groups']:
        count, total = group['channels_kept'], group['channels_total']
        assert count == total or (count > 0 and count % round_to == 0)
    # A stock model takes the shape and the weights.
    stock = built(name)
    shrink(stock, structure_of(stock, kept))
    own = {key: v for key, v in cut.state_dict().items() if key in masks.stock_keys}
    stock.load_state_dict(own, strict=True)
