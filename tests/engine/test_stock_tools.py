"""The stock tools of the toolboxes, and ours that run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import cv2
import pytest
from sklearn.datasets import load_digits

from engine.runs import (
    REPO,
    apart,
    pipeline,
    report,
    run_tool,
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


def amp_run(config_file) -> list[str]:
    """Run the stock tool with `--amp` on a machine that pretends to have a GPU."""
    import functools
    import importlib

    import torch

    amp = importlib.import_module('mmengine.optim.optimizer.amp_optimizer_wrapper')
    amp.is_cuda_available = lambda: True
    amp.GradScaler = functools.partial(torch.amp.GradScaler, device='cpu')
    run_tool(stock_tool('train.py'), str(config_file), '--amp')


def test_amp_of_the_stock_tool_keeps_the_masks(tmp_path):
    import torch

    config = smart_config(tmp_path / 'work', train_cfg=dict(max_epochs=2))
    outcome = apart(amp_run, write_config(tmp_path / 'amp.py', config), log=tmp_path / 'log')
    assert outcome.error is None, outcome.log
    figures = report(tmp_path / 'work')
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']
    checkpoint = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=False)
    assert 'loss_scaler' in checkpoint['optimizer']
    assert checkpoint['optimizer']['smart']['masks']['state'] == 'hard'


def refused(monkeypatch, config_file) -> str:
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config_file)])
    with pytest.raises(SystemExit) as stopped:
        run_stock_tool('train.py')
    return str(stopped.value)


def test_our_tools_name_the_scopes_they_know(tmp_path, monkeypatch):
    path = write_config(tmp_path / 'config.py', dict(default_scope='mmrotate'))
    message = refused(monkeypatch, path)
    assert 'default_scope' in message and 'mmpretrain, mmdet, mmseg' in message


def test_our_tools_say_how_to_install_a_missing_toolbox(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    path = write_config(tmp_path / 'config.py', dict(default_scope='mmseg'))
    message = refused(monkeypatch, path)
    assert 'needs mmseg' in message and 'pip install' in message


def test_configs_may_inherit_from_mmsmart():
    from mmengine.config import utils

    enable_inheritance()
    assert utils.MODULE2PACKAGE['mmsmart'] == 'mmsmart'
    assert (REPO / 'configs').is_dir()
