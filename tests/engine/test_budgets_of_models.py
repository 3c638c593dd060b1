"""Budgets of blocks on the configs' models: met in every resource and part, counted by others."""

from __future__ import annotations

import warnings

import pytest
from mmengine.analysis import FlopAnalyzer

from engine.test_channels_of_models import built, image
from mmsmart import install_masks
from mmsmart.cost import count_positions
from mmsmart.engine.raw_forward import RawForward
from mmsmart.importance import magnitude
from mmsmart.latency import read_table
from mmsmart.report import pruning_report

TABLE = read_table(
    {
        'unit': 'us',
        'layers': [
            {'pattern': '*', 'block': 0.31, 'fixed': 1.5},
            {'pattern': 'backbone*', 'curve': [[0, 2.0], [0.3, 9.0], [0.4, 31.0], [1, 40.0]]},
        ],
    }
)
# Config, and the parts of its model.
EVERY_DAY = [('mmdet/yolox_tiny_8xb8-300e_coco_smart', 'backbone', 'neck')]
SLOW = [
    ('mmpretrain/resnet50_8xb32_in1k_smart', 'backbone.layer3', 'backbone.layer4'),
    ('mmdet/yolox_s_8xb8-300e_coco_smart', 'neck', 'bbox_head'),
    ('mmdet/mask-rcnn_r50_fpn_1x_coco_smart', 'backbone', 'neck'),
    ('mmseg/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024_smart', 'backbone', 'decode_head'),
]
MODELS = [*EVERY_DAY, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]


def macs_by_module(model):
    """MACs of every module in a prediction, as MMEngine traces them."""
    analyser = FlopAnalyzer(RawForward(model), (image(),))
    analyser.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyser.tracer_warnings('none')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = analyser.by_module()
    return {name.removeprefix('model.'): count for name, count in found.items()}


def density(weight):
    return int(weight.count_nonzero()) / weight.numel()


@pytest.mark.parametrize(('name', 'part', 'other'), MODELS)
def test_budgets_are_met_in_every_resource_and_part(name, part, other):
    model = built(name)
    positions = count_positions(model.eval(), lambda: RawForward(model)(image()))
    theirs = macs_by_module(model)
    dense = {key: p.detach().clone() for key, p in model.named_parameters()}
    for sparsity in (
        {'params': 0.6},
        {'macs': 0.6},
        {'latency': 0.4},
        {'params': 0.5, 'macs': 0.5, 'latency': 0.3},
        {part: 0.8, other: 0.6},
        {part: {'macs': 0.7, 'params': 0.5}, other: {'latency': 0.3}},
    ):
        for key, parameter in model.named_parameters():
            parameter.data.copy_(dense[key])
        model.__dict__.pop('block_masks', None)
        masks = install_masks(
            model.train(), sparsity, positions=positions, resource='params', latency=TABLE
        )
        masks.begin(magnitude(masks.layers), 0.5)
        soft = masks.plan.spent(masks.mask().double())
        masks.harden()
        report = pruning_report(model, masks, positions, 'smart', {}, {})
        met = {}
        for row, before in zip(report['budgets'], soft, strict=True):
            assert before <= row['budget'] * (1 + 1e-5)
            assert row['kept'] <= row['budget']
            # Of several, one may bind the soft mask and another the hard one.
            is_met = row['kept'] + row['next_block_cost'] > row['budget']
            was_met = before >= row['budget'] * (1 - 1e-5)
            met.setdefault(row['part'], []).append((was_met, is_met))
            mine = [x for x in masks.layers if x.name.startswith(row['part'])]
            if row['resource'] == 'params':
                left = sum(int(x.weight.count_nonzero()) for x in mine)
                assert left <= row['kept'] <= left + 10  # some weights are 0 from the start
            if row['resource'] == 'macs':
                counted = sum(theirs[x.name] * density(x.weight) for x in mine)
                assert row['kept'] == pytest.approx(counted, rel=1e-3)
        assert all(all(map(any, zip(*parts))) for parts in met.values()), report['budgets']
        counted = sum(theirs[layer.name] * density(layer.weight) for layer in masks.layers)
        assert sum(x['macs_kept'] for x in report['layers']) == pytest.approx(counted, rel=1e-3)
        latency = sum(row['latency_kept'] for row in report['layers'])
        assert report['pruned']['latency'] == pytest.approx(latency)
        for row in report['layers']:
            assert row['blocks_kept'] > 0
        rows = report['budgets']
        if list(sparsity) == ['latency']:
            assert rows[0]['kept'] == pytest.approx(latency, rel=1e-9)
