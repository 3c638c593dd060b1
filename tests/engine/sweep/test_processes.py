"""Trials in processes of their own: what goes wrong there, and a sample of the stock models."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch

from mmsmart.engine.sweep.processes import tried
from mmsmart.engine.sweep.stock_models import StockModel
from mmsmart.engine.sweep.trial import blank_row

SAMPLE = [
    StockModel('mmdet', 'yolox/yolox_tiny_8xb8-300e_coco.py'),
    StockModel('mmdet', 'retinanet/retinanet_r18_fpn_1x_coco.py'),
    StockModel('mmdet', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    StockModel('mmdet', 'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py'),
    StockModel('mmdet', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    StockModel(
        'mmseg', 'deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'
    ),
    StockModel('mmseg', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
    StockModel('mmseg', 'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'),
    StockModel('mmpretrain', 'swin_transformer/swin-tiny_16xb64_in1k.py'),
]  # fmt: skip


@pytest.fixture(scope='module')
def sample_rows():
    rows = tried(SAMPLE, jobs=1, timeout=120, memory=8)
    return {row['config']: row for row in rows}


@pytest.mark.parametrize('model', SAMPLE, ids=lambda model: Path(model.config).stem)
def test_a_stock_model_is_pruned_to_the_exact_budget_and_loads_back(model, sample_rows):
    row = sample_rows[model.config]
    assert row['reason'] == ''
    assert row['outcome'] == 'ok'
    assert row['layers'] > 0 and row['blocks'] > row['layers']


def misbehave(model, enter):
    """Stands for a trial; the model's config says what goes wrong."""
    enter('stock')
    if model.config == 'hangs':
        time.sleep(60)
    enter('SMART')
    reason = ''
    try:
        if model.config == 'crashes':
            os.abort()
        if model.config == 'is large':
            torch.zeros(2**30)
        if model.config == 'downloads':
            socket.create_connection(('127.0.0.1', 9))
    except Exception as error:
        reason = str(error)
    return {**blank_row(model), 'reason': reason}


@pytest.fixture(scope='module')
def bad_rows():
    names = ('hangs', 'crashes', 'is large', 'downloads', 'is well')
    models = [StockModel('mmdet', name) for name in names]
    rows = tried(models, jobs=3, timeout=5, memory=1, trial=misbehave)
    return {row['config']: row for row in rows}


@pytest.mark.parametrize(
    ('name', 'outcome', 'reason'),
    [
        ('hangs', 'stock fails', 'took longer than 5 s'),
        ('crashes', 'SMART fails', 'the process died with exit code -6'),
        ('is large', 'ok', 'allocate'),
        ('downloads', 'ok', 'wants to download'),
        ('is well', 'ok', ''),
    ],
)
def test_a_model_that_misbehaves_is_a_row_and_not_the_end(name, outcome, reason, bad_rows):
    assert bad_rows[name]['outcome'] == outcome
    assert reason in bad_rows[name]['reason']
