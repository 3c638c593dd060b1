"""A model with masks is the upstream model itself."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import ImageClassifier
from torch import nn

from mmsmart import masks_of
from mmsmart.engine import SmartModel

CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, stem_channels=8, base_channels=8, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
)


@pytest.fixture(autouse=True)
def mmpretrain_scope():
    init_default_scope('mmpretrain')


@pytest.mark.parametrize(
    'name', ['SmartModel', 'SmartClassifier', 'SmartDetector', 'SmartSegmentor']
)
def test_built_model_is_the_stock_model_under_every_name(name):
    stock = MODELS.build(copy.deepcopy(CLASSIFIER))
    model = MODELS.build(
        dict(type=f'mmsmart.{name}', model=copy.deepcopy(CLASSIFIER), sparsity=0.5, block=(4, 4))
    )
    assert type(model) is ImageClassifier
    assert not is_model_wrapper(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in stock.named_modules()
    ]
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in stock.named_parameters()
    ]
    assert masks_of(model).sparsity == 0.5
    assert masks_of(model).state == 'dense'


def test_model_that_is_built_already_is_taken_as_it_is():
    model = nn.Sequential(nn.Linear(8, 8))
    assert SmartModel(model=model, block=(4, 4)) is model
    assert masks_of(model).num_blocks == 4


def test_copy_of_a_model_with_masks_computes_the_same():
    model = SmartModel(model=nn.Sequential(nn.Linear(8, 8)), block=(4, 4))
    masks_of(model).begin(torch.arange(4.0), temperature=1.0)
    twin = copy.deepcopy(model)
    images = torch.randn(2, 8)
    assert torch.equal(twin(images), model(images))
    twin[0].weight.data.zero_()
    assert not torch.equal(twin(images), model(images))


class FrozenInTrain(nn.Sequential):
    """Freezes its first layer as mmdet's CSPDarknet does: not when it is built."""

    def train(self, mode: bool = True) -> FrozenInTrain:
        super().train(mode)
        self[0].weight.requires_grad_(False)
        return self


def test_layers_that_are_frozen_in_train_are_left_dense():
    model = SmartModel(model=FrozenInTrain(nn.Linear(8, 8), nn.Linear(8, 8)), block=(4, 4))
    assert [layer.name for layer in masks_of(model).layers] == ['1']
    assert 'frozen' in masks_of(model).excluded[0].reason


def test_masks_stay_with_the_model_whose_synchronised_norms_are_reverted():
    """As every runner does that is not distributed, after the model was built."""
    config = copy.deepcopy(CLASSIFIER)
    config['backbone']['norm_cfg'] = dict(type='SyncBN')
    model = SmartModel(config, sparsity=0.5, block=(4, 4))
    keys = list(model.state_dict())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    reverted = revert_sync_batchnorm(model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in reverted.modules())
    assert list(reverted.state_dict()) == keys
    modules = dict(reverted.named_modules())
    assert all(modules[layer.name] is layer.module for layer in masks_of(reverted).layers)
