"""Choosing the distinct stock models, and preparing their configs."""

from __future__ import annotations

import pytest
from mmengine.config import Config

from mmsmart.engine.sweep import stock_models
from mmsmart.engine.sweep.stock_models import (
    StockModel,
    configs_of,
    distinct_models,
    fingerprint,
    shallower,
    spread,
    stock_model_config,
)


def a_model(**head):
    return {
        'type': 'FCOS',
        'backbone': {'type': 'ResNet', 'depth': 50, 'init_cfg': {'type': 'Pretrained'}},
        'bbox_head': {'type': 'FCOSHead', 'num_classes': 80, **head},
        'test_cfg': {'nms': {'iou_threshold': 0.5}},
    }


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A folder of configs that stands for those of mmdet."""
    monkeypatch.setattr(stock_models, 'configs_of', lambda package: tmp_path)

    def write(name, model=None, text=''):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or (f'model = {model!r}\n' if model else 'data_root = "data"\n'))

    return write


def test_configs_that_differ_in_classes_and_weights_hold_one_model():
    other = a_model(num_classes=20)
    other['backbone']['init_cfg'] = None
    other['test_cfg'] = None
    assert fingerprint(a_model()) == fingerprint(other)


@pytest.mark.parametrize('change', [{'type': 'ATSSHead'}, {'stacked_convs': 2}])
def test_configs_that_differ_in_a_layer_hold_two(change):
    assert fingerprint(a_model()) != fingerprint(a_model(**change))


def test_each_distinct_model_is_named_once_with_the_number_of_its_configs(configs):
    configs('fcos/a.py', a_model())
    configs('fcos/b.py', a_model(num_classes=3))
    configs('fcos/c.py', a_model(stacked_convs=2))
    configs('atss/a.py', a_model(type='ATSSHead'))
    configs('_base_/models/fcos.py', a_model(stacked_convs=9))
    configs('common/schedule.py')
    assert distinct_models('mmdet') == [
        StockModel('mmdet', 'atss/a.py', 1),
        StockModel('mmdet', 'fcos/a.py', 2),
        StockModel('mmdet', 'fcos/c.py', 1),
    ]
    assert [model.config for model in distinct_models('mmdet', 'atss/*')] == ['atss/a.py']


def test_any_beginning_of_the_list_has_as_many_architectures_as_it_can():
    names = [f'{folder}/{i}' for folder, n in (('a', 3), ('b', 1), ('c', 2)) for i in range(n)]
    order = [model.config for model in spread(StockModel('mmdet', name) for name in names)]
    assert order == ['a/0', 'b/0', 'c/0', 'a/1', 'c/1', 'a/2']


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(FileNotFoundError, match='mmnothing is not installed'):
        configs_of('mmnothing')


def test_a_stock_model_needs_no_download_and_no_second_process():
    model = a_model(norm_cfg={'type': 'SyncBN'}, init_cfg={'type': 'Normal', 'std': 0.01})
    config = Config({'model': model, 'data_preprocessor': {'type': 'P', 'batch_augments': [1]}})
    changed = stock_model_config(config)
    assert 'init_cfg' not in changed.backbone
    assert changed.bbox_head.init_cfg.type == 'Normal'
    assert changed.bbox_head.norm_cfg.type == 'BN'
    assert changed.data_preprocessor.batch_augments is None
    assert config.model.bbox_head.norm_cfg.type == 'SyncBN'


@pytest.mark.parametrize(
    ('backbone', 'reduced'),
    [
        ({'type': 'ResNeXt', 'depth': 101}, {'depth': 50}),
        ({'type': 'SwinTransformer', 'depths': (2, 2, 18, 2)}, {'depths': [2, 2, 2, 2]}),
        ({'type': 'Any', 'arch': {'num_layers': 24}}, {'arch': {'num_layers': 2}}),
    ],
)
def test_a_large_backbone_gets_fewer_layers_and_the_row_says_so(backbone, reduced):
    model = {'backbone': dict(backbone)}
    assert shallower(model)
    assert model['backbone'] == {**backbone, **reduced}


def test_a_backbone_named_by_its_size_gets_the_same_width_with_fewer_layers():
    model = {'backbone': {'type': 'mmpretrain.VisionTransformer', 'arch': 'l'}}
    assert shallower(model) == '24 layers to 2'
    assert model['backbone']['arch']['embed_dims'] == 1024
    assert model['backbone']['arch']['num_layers'] == 2


@pytest.mark.parametrize('backbone', [{'type': 'ResNet', 'depth': 50}, {'type': 'DLANet'}])
def test_a_backbone_without_a_handle_stays(backbone):
    model = {'backbone': dict(backbone)}
    assert shallower(model) == ''
    assert model['backbone'] == backbone


def test_a_config_that_cannot_be_read_counts_as_a_model(configs):
    configs('fcos/a.py', text='_base_ = ["nowhere.py"]\n')
    assert distinct_models('mmdet') == [StockModel('mmdet', 'fcos/a.py')]
