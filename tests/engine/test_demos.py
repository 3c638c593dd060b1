"""A few steps of each demo on scenes: budget, metrics, and the picture of what the models see."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config

from engine.runs import REPO, apart, pruned_weights, report
from mmsmart.engine.stock_tools import enable_inheritance

DEMO = runpy.run_path(str(REPO / 'tools/demo.py'))
SCENES = sorted(set(DEMO['DEMOS']) - {'digits'})


def config_of(name):
    enable_inheritance()
    return Config.fromfile(REPO / 'configs' / DEMO['DEMOS'][name].config)


def small_config_of(name, work_dir):
    """The demo's recipe with 8 iterations: 4 dense, 2 search, 2 fine-tune."""
    config = config_of(name)
    data = config.train_dataloader.dataset
    data = data.get('dataset', data)  # YOLOX mixes several images
    for dataset in (data, config.val_dataloader.dataset, config.test_dataloader.dataset):
        dataset.scenes = 8
    config.train_dataloader.batch_size = 4
    by_epoch = 'max_epochs' in config.train_cfg
    config.train_cfg.update({'max_epochs': 4, 'val_interval': 4} if by_epoch else {'max_iters': 8})
    config.default_hooks.checkpoint.interval = 2 if by_epoch else 4
    config.smart.update(stages=dict(pretrain=0.5, search=0.25, finetune=0.25))
    config.smart.importance.batches = 1
    if name == 'det':
        config.model.test_cfg.score_thr = 0  # so short a training is sure of nothing
    config.work_dir = str(work_dir)
    return config


def run_and_draw(config):
    from mmengine.registry import RUNNERS

    from mmsmart.engine import pruning_hook
    from mmsmart.engine.predictions import draw_predictions

    pruning_hook.draw_report = lambda *args: None  # takes longer than the run
    pruning_hook.show_masks = lambda *args: None  # and so does this
    config = Config(config)
    RUNNERS.build(config).train()
    work_dir = Path(config.work_dir)
    checkpoints = {'dense': DEMO['dense_checkpoint'](config), 'pruned': work_dir / 'pruned.pth'}
    draw_predictions(config, checkpoints, work_dir / 'predictions.png', scenes=3)


@pytest.fixture(scope='module', params=SCENES)
def demo(request, tmp_path_factory):
    """Name and folder of a finished run."""
    if request.param != 'seg':
        pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    work_dir = tmp_path_factory.mktemp(request.param)
    config = small_config_of(request.param, work_dir).to_dict()
    outcome = apart(run_and_draw, config, log=work_dir / 'stdout.txt')
    assert outcome.exitcode == 0 and outcome.error is None, outcome.log
    return request.param, work_dir


def assert_pruned(state, layers):
    for layer in layers:
        left = int(state[f'{layer["name"]}.weight'].count_nonzero())
        assert left == layer['params_kept'], layer['name']


def test_budget_is_met_to_within_one_block(demo):
    figures = report(demo[1])
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']
    assert sum(layer['params_kept'] for layer in figures['layers']) == figures['kept']
    assert_pruned(pruned_weights(demo[1]), figures['layers'])


def test_averaged_weights_are_pruned_like_the_trained_ones(demo):
    name, work_dir = demo
    if name != 'det':
        pytest.skip('only YOLOX averages its weights')
    last = torch.load(work_dir / 'epoch_4.pth', weights_only=False)
    assert_pruned(last['state_dict'], report(work_dir)['layers'])
    averaged = {key.removeprefix('module.'): value for key, value in last['ema_state_dict'].items()}
    assert_pruned(averaged, report(work_dir)['layers'])


def test_dense_and_pruned_metrics_are_those_of_the_task(demo):
    name, work_dir = demo
    expected = dict(
        det={'coco/bbox_mAP', 'coco/bbox_mAP_50'},
        inst={'coco/bbox_mAP', 'coco/segm_mAP'},
        seg={'mIoU'},
    )
    figures = report(work_dir)
    for metrics in (figures['dense'], figures['pruned']):
        assert expected[name] <= set(metrics)
        assert all(math.isfinite(metrics[key]) for key in expected[name])


def test_picture_has_a_column_for_each_scene_and_a_row_for_truth_and_models(demo):
    height, width = cv2.imread(str(demo[1] / 'predictions.png')).shape[:2]
    assert height == width > 300


@pytest.mark.parametrize('name', SCENES)
def test_the_run_keeps_the_dense_model(name):
    config = config_of(name)
    config.work_dir = 'somewhere'
    number = int(DEMO['dense_checkpoint'](config).stem.split('_')[1])
    checkpoints = config.default_hooks.checkpoint
    assert number % checkpoints.interval == 0
    assert checkpoints.max_keep_ckpts == -1
