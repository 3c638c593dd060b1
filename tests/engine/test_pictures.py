"""While a run goes on, scalars and pictures of the masks reach the visualisation backends."""

from __future__ import annotations

import importlib
import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from engine.runs import apart, smart_config
from mmsmart import install_masks
from mmsmart.engine.pictures import draw_now, layers_now

HAS_TENSORBOARD = importlib.util.find_spec('tensorboard') is not None
SCALARS = ('train/loss', 'train/temperature', 'train/undecided', 'train/moved', 'train/sparsity')


def train_undrawn(config):
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    from mmsmart.engine import pruning_hook

    pruning_hook.draw_report = lambda *args: None  # takes longer than the run
    RUNNERS.build(Config(config)).train()


@pytest.fixture(scope='module')
def vis_data(tmp_path_factory):
    """Where the backends of a finished run wrote to."""
    work_dir = tmp_path_factory.mktemp('pictures')
    config = smart_config(work_dir)
    if HAS_TENSORBOARD:
        config['visualizer']['vis_backends'].append(dict(type='TensorboardVisBackend'))
    outcome = apart(train_undrawn, config, log=work_dir / 'stdout.txt')
    assert outcome.exitcode == 0 and outcome.error is None, outcome.log
    (folder,) = work_dir.glob('*/vis_data')
    return folder


def steps_of_pictures(vis_data):
    return sorted(
        int(path.stem.removeprefix('masks_')) for path in vis_data.glob('vis_image/*.png')
    )


def test_the_local_backend_has_pictures_of_the_search_and_of_its_end(vis_data):
    steps = steps_of_pictures(vis_data)
    assert len(steps) >= 3 and 12 in steps and steps[0] >= 6  # nothing is masked before
    soft, hard = (cv2.imread(str(vis_data / f'vis_image/masks_{i}.png')) for i in (12, steps[-1]))
    assert soft.shape == hard.shape and soft.shape[1] > 1000
    assert (soft != hard).any()


def test_the_local_backend_has_the_scalars_of_the_search(vis_data):
    rows = [json.loads(line) for line in (vis_data / 'scalars.json').read_text().splitlines()]
    searched = [row for row in rows if 6 < row.get('iter', 0) <= 18]
    assert len(searched) == 12
    for name in SCALARS:
        assert all(name.removeprefix('train/') in row for row in searched), name


@pytest.mark.skipif(not HAS_TENSORBOARD, reason='tensorboard is not installed')
def test_tensorboard_has_the_same_scalars_and_pictures(vis_data):
    accumulator = importlib.import_module('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(vis_data), size_guidance={'images': 0, 'scalars': 0})
    events.Reload()
    assert {name.removeprefix('train/') for name in SCALARS} <= set(events.Tags()['scalars'])
    assert {event.step for event in events.Images('masks')} == set(steps_of_pictures(vis_data))
    assert len(events.Scalars('temperature')) == 12


def test_the_layers_shown_hold_what_the_mask_keeps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))
    masks = install_masks(model, 0.5, (2, 2, 1, 1))
    masks.begin(torch.randn(masks.num_blocks), temperature=0.5)
    layers = layers_now(masks)
    assert [layer.name for layer in layers] == ['0', '2']
    assert [layer.image.shape for layer in layers] == [(4, 2), (3, 4)]
    assert sum(layer.params_kept for layer in layers) == pytest.approx(masks.budget, rel=1e-5)
    masks.harden()
    for layer, module in zip(layers_now(masks), (model[0], model[2])):
        assert layer.params_kept == int((module.weight != 0).sum())
        assert layer.image.mean() == pytest.approx(float((module.weight != 0).float().mean()))


def test_a_picture_of_one_small_layer_is_drawn_like_one_of_many_long_names():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    masks = install_masks(model, 0.5, (4, 4))
    masks.begin(torch.randn(masks.num_blocks), temperature=1.0)
    many = layers_now(masks)
    for layers in (many[:1], many):
        image = draw_now(layers, 7, 1.0)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert image.std() > 10  # not blank


def test_coupled_channels_are_shown_too():
    pytest.importorskip('torch_pruning', reason='channels need Torch-Pruning')
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    images = torch.zeros(1, 3, 8, 8)
    masks = install_masks(model, 0.5, 'channel', forward=lambda net: [net(images)])
    masks.begin(torch.randn(masks.num_blocks), temperature=0.01)
    masks.harden()
    first, last = layers_now(masks)
    assert first.image.shape == (8, 3) and last.image.shape == (4, 8)
    kept = (model[3].weight != 0).float()[..., 0, 0]
    assert (torch.from_numpy(last.image) == kept).all()
