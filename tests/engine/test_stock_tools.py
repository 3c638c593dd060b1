"""The stock tools of the toolboxes, and ours that run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import cv2
import pytest
from mmengine.config import Config
from mmengine.config import utils as config_utils
from sklearn.datasets import load_digits

from engine.runs import (
    apart,
    assert_finished,
    assert_on_budget,
    pipeline,
    report,
    run_tool,
    run_tool_mixed,
    smart_config,
    stock_config,
    stock_tool,
    write_config,
)
from mmsmart.engine.stock_tools import enable_inheritance, run_stock_tool


def write_images(folder) -> None:
    """The test digits of the runs, one file each, in folders by class."""
    digits = load_digits()
    for index in range(0, 600, 4):
        label = folder / str(digits.target[index])
        label.mkdir(parents=True, exist_ok=True)
        image = (digits.images[index] * 255 / 16).round().astype('uint8')
        cv2.imwrite(str(label / f'{index:04}.png'), cv2.merge(3 * [image]))


def test_stock_test_tool_scores_the_checkpoint_without_mmsmart(tmp_path, finished_run):
    finished, _ = finished_run
    config = stock_config(tmp_path / 'work')
    write_images(tmp_path / 'digits')
    loader = config['test_dataloader']
    loader['dataset'] = dict(
        type='CustomDataset',
        data_root=str(tmp_path / 'digits'),
        pipeline=pipeline(dict(type='LoadImageFromFile')),
    )
    keys = ('default_scope', 'model', 'test_evaluator', 'test_cfg', 'default_hooks')
    path = write_config(
        tmp_path / 'stock.py',
        {**{key: config[key] for key in keys}, 'test_dataloader': loader},
    )
    # An import of mmsmart would end the process.
    (tmp_path / 'mmsmart.py').write_text('raise SystemExit("mmsmart was imported")')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', stock_tool('test.py'), path, finished / 'pruned.pth'],
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r'accuracy/top1: ([\d.]+)', done.stdout + done.stderr)
    assert float(accuracy) == pytest.approx(report(finished)['pruned']['accuracy/top1'], abs=1e-3)


def test_stock_test_tool_scores_the_pruning_config_too(tmp_path, finished_run):
    finished, _ = finished_run
    path = write_config(tmp_path / 'pruned.py', smart_config(tmp_path / 'work'))
    arguments = [str(path), str(finished / 'pruned.pth')]
    outcome = apart(run_tool, stock_tool('test.py'), *arguments, log=tmp_path / 'log')
    assert outcome.error is None, outcome.log
    (accuracy,) = re.findall(r'accuracy/top1: ([\d.]+)', outcome.log)
    assert float(accuracy) == pytest.approx(report(finished)['pruned']['accuracy/top1'], abs=1e-3)


def test_amp_of_the_stock_tool_keeps_the_masks(tmp_path):
    import torch

    config = smart_config(tmp_path / 'work', train_cfg=dict(max_epochs=2))
    path = write_config(tmp_path / 'amp.py', config)
    assert_finished(run_tool_mixed, stock_tool('train.py'), path, log=tmp_path / 'log')
    assert_on_budget(tmp_path / 'work')
    checkpoint = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=False)
    assert 'loss_scaler' in checkpoint['optimizer']
    assert checkpoint['optimizer']['smart']['masks']['state'] == 'hard'


def refused(monkeypatch, config_file) -> str:
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config_file)])
    with pytest.raises(SystemExit) as stopped:
        run_stock_tool('train.py')
    return str(stopped.value)


@pytest.mark.parametrize(
    ('config', 'found'),
    [(dict(default_scope='mmrotate'), "'mmrotate'"), (dict(work_dir='work'), 'missing')],
    ids=['unknown', 'missing'],
)
def test_our_tools_name_the_scopes_they_know(tmp_path, monkeypatch, config, found):
    message = refused(monkeypatch, write_config(tmp_path / 'config.py', config))
    assert f'default_scope is {found}' in message and 'mmpretrain, mmdet, mmseg' in message


def test_our_tools_say_how_to_install_a_missing_toolbox(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    path = write_config(tmp_path / 'config.py', dict(default_scope='mmseg'))
    message = refused(monkeypatch, path)
    assert 'needs mmseg' in message and 'pip install' in message


def inherited(tmp_path, base) -> Config:
    enable_inheritance()
    enable_inheritance()  # twice is as good as once
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = [{base!r}]')
    return Config.fromfile(path)


def test_configs_may_inherit_from_mmsmart(tmp_path):
    config = inherited(tmp_path, 'mmsmart::_base_/smart.py')
    assert config.runner_type == 'mmsmart.SmartRunner'
    # A scope would make every `type` in it one of mmsmart's.
    assert '_scope_' not in str(config)


def test_models_of_our_configs_belong_to_their_toolbox(tmp_path):
    config = inherited(tmp_path, 'mmsmart::mmpretrain/resnet18_digits_smart.py')
    assert config.model['_scope_'] == 'mmpretrain'
    assert '_scope_' not in config.smart


SEGMENTOR = 'unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'
UPSTREAM = {
    'mmpretrain': 'resnet/resnet50_8xb32_in1k.py',
    'mmdet': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'mmseg': SEGMENTOR,
}


@pytest.mark.parametrize(('scope', 'name'), UPSTREAM.items())
def test_configs_may_inherit_from_every_toolbox(tmp_path, scope, name):
    assert inherited(tmp_path, f'{scope}::{name}').model['_scope_'] == scope


def test_a_toolbox_is_found_whatever_its_distribution_is_called(tmp_path, monkeypatch):
    """As with onedl-mmsegmentation, which MMEngine's table does not know."""
    monkeypatch.setitem(config_utils.MODULE2PACKAGE, 'mmseg', 'no-such-distribution')
    assert inherited(tmp_path, f'mmseg::{SEGMENTOR}').model['_scope_'] == 'mmseg'


def test_what_mmengine_finds_itself_is_left_to_it(tmp_path, monkeypatch):
    """As with the original mmsegmentation: its distribution is the one in MMEngine's table."""
    configs = tmp_path / 'original/.mim/configs'
    (configs / 'mine').mkdir(parents=True)
    (configs / 'mine/config.py').write_text('found_by_mmengine = True')
    (configs.parent / 'model-index.yml').write_text('Import: []')
    metadata = tmp_path / 'mmsegmentation-1.2.2.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text('Name: mmsegmentation\nVersion: 1.2.2')
    (metadata / 'top_level.txt').write_text('original')
    monkeypatch.syspath_prepend(tmp_path)
    assert inherited(tmp_path, 'mmseg::mine/config.py').found_by_mmengine


@pytest.mark.parametrize('base', [f'{scope}::unet/misspelt.py' for scope in ('mmseg', 'mmsmart')])
def test_a_base_file_that_does_not_exist_is_named_with_its_path(tmp_path, base):
    with pytest.raises(FileNotFoundError, match=r'configs/unet/misspelt\.py'):
        inherited(tmp_path, base)


def test_a_package_that_is_not_known_is_refused_by_mmengine(tmp_path):
    with pytest.raises(AssertionError, match='does not support to load mmnothing config'):
        inherited(tmp_path, 'mmnothing::a/b.py')
