"""The recipe of docs/quantisation.md: int8 by ONNX Runtime's tools, pruned blocks stay zero."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.runs import smart_config, write_config
from mmengine.runner import Runner

from mmsmart import install_masks
from mmsmart.engine.export import export_onnx, load_model, read_config
from mmsmart.export import save_plain_checkpoint
from mmsmart.importance import magnitude

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

PAGE = Path(__file__).parents[1] / 'docs/quantisation.md'
INT8 = ('pruned_dynamic.onnx', 'pruned_static.onnx')


def train(model, loader, epochs, lr, masks=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in loader:
            data = model.data_preprocessor(batch, True)
            model.parse_losses(model(**data, mode='loss'))[0].backward()
            with masks.latent_weights():
                optimizer.step()
            optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small classifier of digits, pruned by hand, and what the page's examples make of it."""
    folder = tmp_path_factory.mktemp('quantisation')
    torch.manual_seed(0)
    settings = smart_config(folder)
    settings['train_dataloader'].update(batch_size=64)
    settings['train_dataloader']['dataset'].pop('indices')
    settings['val_dataloader']['dataset'].pop('indices')
    path = write_config(folder / 'my_config_smart.py', settings)
    config = read_config(path)
    model, loader = load_model(config), loader_of(config.train_dataloader)
    masks = install_masks(model, sparsity=0.7, block=(8, 8, 1, 1))
    train(model, loader, epochs=4, lr=3e-3, masks=masks)
    masks.begin(magnitude(masks.layers), 0.1)
    masks.harden()
    train(model, loader, epochs=4, lr=1e-3, masks=masks)
    save_plain_checkpoint(model, folder / 'pruned.pth')
    export_onnx(config, folder / 'pruned.pth', folder / 'pruned.onnx')
    return folder


def loader_of(settings):
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return Runner.build_dataloader(settings, seed=0)


@pytest.fixture(scope='module')
def quantised(folder):
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for example in re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), flags=re.M | re.S):
            exec(example, names)
    return folder


@pytest.fixture(scope='module')
def digits(folder):
    """All test images, preprocessed, with their labels."""
    config = read_config(folder / 'my_config_smart.py')
    preprocessor = load_model(config).data_preprocessor
    batches = [preprocessor(batch) for batch in loader_of(config.val_dataloader)]
    images = torch.cat([batch['inputs'] for batch in batches]).numpy()
    return images, np.array([int(s.gt_label) for batch in batches for s in batch['data_samples']])


def scores(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return np.concatenate([session.run(['scores'], {'images': image[None]})[0] for image in images])


def stored(path):
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def test_the_classifier_has_learnt_something_to_lose(folder, digits):
    images, labels = digits
    assert (scores(folder / 'pruned.onnx', images).argmax(1) == labels).mean() > 0.8


@pytest.mark.parametrize('file', INT8)
def test_accuracy_stays_within_a_point(quantised, digits, file):
    images, labels = digits
    dense, int8 = (scores(quantised / name, images) for name in ('pruned.onnx', file))
    assert np.abs(int8 - dense).max() < 0.25 * np.abs(dense).max()
    dense, int8 = ((values.argmax(1) == labels).mean() for values in (dense, int8))
    assert abs(int8 - dense) <= 0.01


@pytest.mark.parametrize('file', INT8)
def test_pruned_blocks_are_int8_zeros(quantised, file):
    weights = torch.load(quantised / 'pruned.pth', weights_only=True)['state_dict']
    tensors = stored(quantised / file)
    convolutions = {key: value.numpy() for key, value in weights.items() if value.ndim == 4}
    assert len(convolutions) == 20
    pruned = 0
    for key, weight in convolutions.items():
        int8 = tensors[f'model.{key}_quantized']
        assert int8.dtype == np.int8 and int8.shape == weight.shape
        assert not tensors[f'model.{key}_zero_point'].any()
        assert not int8[weight == 0].any()
        assert np.abs(int8).max() == 127  # and not zero because everything is
        pruned += int((weight == 0).sum())
    assert pruned > 0.6 * sum(weight.size for weight in convolutions.values())


@pytest.mark.parametrize('file', INT8)
def test_the_int8_file_takes_a_quarter_of_the_bytes_of_its_weights(quantised, file):
    weights = torch.load(quantised / 'pruned.pth', weights_only=True)['state_dict']
    count = sum(value.numel() for value in weights.values() if value.ndim > 1)
    saved = (quantised / 'pruned.onnx').stat().st_size - (quantised / file).stat().st_size
    assert saved > 0.5 * 3 * count


def test_asymmetric_weights_do_not_keep_zeros(folder, tmp_path):
    """What the page warns of, so that the tests above can fail."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(folder / 'pruned.onnx', tmp_path / 'u8.onnx', weight_type=QuantType.QUInt8)
    dense, tensors = stored(folder / 'pruned.onnx'), stored(tmp_path / 'u8.onnx')
    key = 'model.backbone.layer4.1.conv2.weight'
    assert tensors[f'{key}_zero_point'].any()
    assert tensors[f'{key}_quantized'][dense[key] == 0].all()
