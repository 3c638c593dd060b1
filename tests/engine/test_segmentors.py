"""Stock segmentors under pruning, by mmseg's own tools and by ours."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch

from engine.runs import (
    BASE,
    REPO,
    assert_finished,
    assert_on_budget,
    assert_same_end,
    report,
    run_tool_mixed,
    run_tool_undrawn,
    scored,
    scored_by_stock_tool,
    stock_tool,
    write_config,
)
from engine.tiny_sets import DEEPLAB, SMART, deeplab, upstream_config, write_segmentation

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def deeplab_run(tmp_path_factory):
    """Stock config, pruning config, folder and log of what mmseg's own tool has pruned."""
    folder = tmp_path_factory.mktemp('deeplab')
    changes = deeplab(write_segmentation(folder / 'tiny'), folder / 'work')
    stock = write_config(folder / 'stock.py', changes, [upstream_config('mmseg', DEEPLAB)])
    pruned = write_config(folder / 'pruned.py', dict(smart=SMART), [stock, BASE])
    tool = stock_tool('train.py', 'mmseg')
    outcome = assert_finished(run_tool_undrawn, tool, pruned, log=folder / 'log')
    return stock, pruned, folder / 'work', outcome.log


def test_a_segmentor_with_synchronised_norms_is_pruned_on_a_cpu(deeplab_run):
    *_, work_dir, log = deeplab_run
    assert 'SyncBN' in (work_dir / 'pruned.py').read_text()
    assert 'SyncBatchNorm (SyncBN) layers in the model will be automatically reverted' in log
    assert_on_budget(work_dir)
    assert {row['reason'].partition(':')[0] for row in report(work_dir)['excluded']} == {
        'depthwise'
    }


def test_our_tool_and_drawn_predictions_change_nothing_of_a_segmentor(tmp_path, deeplab_run):
    _, pruned, work_dir, _ = deeplab_run
    assert_finished(
        run_tool_undrawn,
        REPO / 'tools/train.py',
        pruned,
        '--work-dir',
        tmp_path / 'ours',
        '--cfg-options',
        'default_hooks.visualization.draw=True',
        log=tmp_path / 'log',
    )
    assert_same_end(work_dir, tmp_path / 'ours')
    assert len(list((tmp_path / 'ours').glob('*/vis_data/vis_image/*.png'))) > 2


def label_maps(folder):
    return {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in folder.glob('*.png')}


def test_stock_test_tool_scores_a_segmentor_as_the_last_validation_did(tmp_path, deeplab_run):
    stock, _, work_dir, _ = deeplab_run
    weights = work_dir / 'pruned.pth'
    outcome = assert_finished(
        scored_by_stock_tool, 'mmseg', stock, weights, tmp_path / 'test', log=tmp_path / 'log'
    )
    figures = report(work_dir)['pruned']
    assert outcome.value.items() <= figures.items()
    assert outcome.value['mIoU'] > 0


def test_augmented_test_of_the_pruning_config_segments_like_the_stock_config(tmp_path, deeplab_run):
    stock, pruned, work_dir, _ = deeplab_run
    found = []
    for name, function, config in (
        ('stock', scored_by_stock_tool, stock),
        ('pruned', scored, pruned),
    ):
        outcome = assert_finished(
            function, 'mmseg', config, work_dir / 'pruned.pth', tmp_path / name, '--tta',
            '--out', str(tmp_path / f'{name}_maps'), log=tmp_path / 'log',
        )  # fmt: skip
        found.append((outcome.value, label_maps(tmp_path / f'{name}_maps')))
    (values, maps), (other_values, other_maps) = found
    assert values == other_values
    assert maps.keys() == other_maps.keys() and len(maps) == 2
    assert all(np.array_equal(maps[name], other_maps[name]) for name in maps)
    assert len(np.unique(np.concatenate([image.ravel() for image in maps.values()]))) > 1
    single = report(work_dir)['pruned']
    assert values != {key: single[key] for key in values}


def test_amp_of_the_segmentation_tool_keeps_the_masks(tmp_path, deeplab_run):
    _, pruned, *_ = deeplab_run
    work_dir = tmp_path / 'work'
    tool = stock_tool('train.py', 'mmseg')
    assert_finished(run_tool_mixed, tool, pruned, '--work-dir', work_dir, log=tmp_path / 'log')
    assert_on_budget(work_dir)
    checkpoint = torch.load(work_dir / 'iter_30.pth', weights_only=False)
    assert 'loss_scaler' in checkpoint['optimizer']
    assert checkpoint['optimizer']['smart']['masks']['state'] == 'hard'


def test_maps_of_class_scores_are_distilled(tmp_path, deeplab_run):
    _, pruned, *_ = deeplab_run
    work_dir = tmp_path / 'work'
    assert_finished(
        run_tool_undrawn, stock_tool('train.py', 'mmseg'), pruned, '--work-dir', work_dir,
        '--cfg-options', 'smart.distillation.weight=0.1', 'smart.distillation.of=outputs',
        log=tmp_path / 'log',
    )  # fmt: skip
    assert_on_budget(work_dir)
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    distances = [line['distillation'] for line in lines if 'distillation' in line]
    assert distances and all(0 < distance < math.inf for distance in distances)
