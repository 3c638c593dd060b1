"""Errors that MMEngine and the toolboxes leave obscure name the key of the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.runs import BASE, apart, merged, run_tool, smart_config, stock_tool, train, write_config
from engine.tiny_sets import (
    DEEPLAB,
    RETINANET,
    SMART,
    deeplab,
    retinanet,
    upstream_config,
    write_coco,
    write_segmentation,
)


def refused(config: dict) -> str:
    outcome = train(config)
    assert outcome.error is not None and 'Epoch(train)' not in outcome.log
    return outcome.error


@pytest.mark.parametrize('scope', ['mmseg', 'mmdetection', None])
def test_a_scope_that_lacks_the_types_is_named_with_the_one_that_was_meant(tmp_path, scope):
    config = smart_config(tmp_path)
    del config['default_scope']
    if scope is not None:
        config['default_scope'] = scope
    error = refused(config)
    assert error.startswith(f'ValueError: default_scope: {repr(scope) if scope else "missing"}')
    assert "Write default_scope = 'mmpretrain'" in error


def test_a_data_set_of_another_scope_is_named_too(tmp_path):
    """It is built when training begins, after the runner."""
    config = smart_config(tmp_path)
    config['train_dataloader']['dataset'] = dict(type='CityscapesDataset', pipeline=[])
    error = refused(config)
    assert error.startswith("ValueError: default_scope: 'mmpretrain', but CityscapesDataset is a")
    assert 'mmseg.CityscapesDataset' in error


def test_a_type_that_no_toolbox_has_is_left_to_mmengine(tmp_path):
    error = refused(smart_config(tmp_path, model=dict(type='ImageClasifier')))
    assert error.startswith('KeyError: ') and 'ImageClasifier is not in the' in error


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    error = refused(smart_config(tmp_path, load_from='nowhere/dense.pth'))
    assert error.startswith("FileNotFoundError: load_from = 'nowhere/dense.pth': ")


def test_an_error_over_something_else_is_left_alone(tmp_path):
    config = smart_config(tmp_path, custom_hooks=[dict(type='Unfound')])
    assert refused(config) == 'FileNotFoundError: 6 of 7'


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('coco') / 'tiny')


@pytest.fixture(scope='module')
def segmentation(tmp_path_factory):
    return write_segmentation(tmp_path_factory.mktemp('segmentation') / 'tiny')


def refused_by_tool(folder: Path, scope: str, upstream: str, config: dict) -> str:
    bases = [upstream_config(scope, upstream), BASE]
    path = write_config(folder / 'config.py', {**config, 'smart': SMART}, bases)
    outcome = apart(run_tool, stock_tool('train.py', scope), path, log=folder / 'log')
    assert outcome.error is not None
    assert '(train)' not in outcome.log
    return outcome.error


DETECTION = {
    'no annotations': (
        dict(train_dataloader=dict(dataset=dict(ann_file='trian.json'))),
        ['train_dataloader.dataset.data_root', "train_dataloader.dataset.ann_file = 'trian.json'"],
    ),
    'no images': (
        dict(val_dataloader=dict(dataset=dict(data_prefix=dict(img='val/')))),
        ['val_dataloader.dataset.data_root', "val_dataloader.dataset.data_prefix.img = 'val/'"],
    ),
    'no images in a worker': (
        dict(train_dataloader=dict(num_workers=1, dataset=dict(data_prefix=dict(img='train/')))),
        ["train_dataloader.dataset.data_prefix.img = 'train/'"],
    ),
    'no truth to evaluate': (
        dict(val_evaluator=dict(ann_file='nowhere/val.json')),
        ["val_evaluator.ann_file = 'nowhere/val.json'"],
    ),
    'other classes': (
        dict(train_dataloader=dict(dataset=dict(metainfo=dict(classes=('cat', 'dog'))))),
        ['train_dataloader.dataset: not one image', "metainfo.classes = ('cat', 'dog')"],
    ),
}


@pytest.mark.parametrize('name', DETECTION)
def test_detection_data_that_is_not_found_is_named(tmp_path, coco, name):
    pytest.importorskip('mmcv._ext', reason='detectors need the compiled ops of mmcv')
    changes, words = DETECTION[name]
    config = merged(retinanet(coco, tmp_path / 'work'), changes)
    error = refused_by_tool(tmp_path, 'mmdet', RETINANET, config)
    assert all(word in error for word in words), error


SEGMENTATION = {
    'no folder': (
        dict(train_dataloader=dict(dataset=dict(data_root='nowhere'))),
        ["train_dataloader.dataset.data_root = 'nowhere'", 'data_prefix.img_path'],
    ),
    'no labels': (
        dict(train_dataloader=dict(dataset=dict(data_prefix=dict(seg_map_path='masks')))),
        ["train_dataloader.dataset.data_prefix.seg_map_path = 'masks'"],
    ),
    'no list': (
        dict(train_dataloader=dict(dataset=dict(ann_file='train.txt'))),
        ["train_dataloader.dataset.ann_file = 'train.txt'"],
    ),
    'other suffix': (
        dict(val_dataloader=dict(dataset=dict(img_suffix='.jpg'))),
        ['val_dataloader.dataset: not one image', "img_suffix = '.jpg'"],
    ),
}


@pytest.mark.parametrize('name', SEGMENTATION)
def test_segmentation_data_that_is_not_found_is_named(tmp_path, segmentation, name):
    changes, words = SEGMENTATION[name]
    config = merged(deeplab(segmentation, tmp_path / 'work'), changes)
    error = refused_by_tool(tmp_path, 'mmseg', DEEPLAB, config)
    assert all(word in error for word in words), error
