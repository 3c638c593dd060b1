"""Tests of mmsmart.export: files that are handed on."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmsmart import install_masks
from mmsmart.export import (
    complete_or_absent,
    expect_at_most,
    largest_difference,
    plain,
    save_exported_program,
    save_onnx,
    save_plain_checkpoint,
)


def stock():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))


def pruned():
    model = stock()
    masks = install_masks(model, 0.5, (2, 2, 1, 1))
    masks.begin(torch.randn(masks.num_blocks), 0.1)
    masks.harden()
    return model


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# The checkpoint


def test_the_stock_model_loads_the_checkpoint_strictly(tmp_path):
    model = pruned()
    save_plain_checkpoint(model, tmp_path / 'pruned.pth')
    checkpoint = torch.load(tmp_path / 'pruned.pth', weights_only=True)
    assert sorted(checkpoint) == ['meta', 'state_dict']
    fresh = stock()
    fresh.load_state_dict(checkpoint['state_dict'], strict=True)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert list(checkpoint['state_dict']) == list(stock().state_dict())


def test_a_name_that_a_layer_is_given_while_the_model_runs_is_not_saved(tmp_path):
    """As DDQ DETR does in training: the stock model built anew does not know that name."""
    model = pruned()
    model.add_module('alias', model[2])
    model.register_buffer('seen', torch.ones(2))
    save_plain_checkpoint(model, tmp_path / 'pruned.pth')
    state = torch.load(tmp_path / 'pruned.pth', weights_only=True)['state_dict']
    assert list(state) == ['seen', *stock().state_dict()]


def test_a_weight_that_the_stock_model_has_under_two_names_is_saved_under_both(tmp_path):
    model = stock()
    model.add_module('alias', model[2])
    install_masks(model, 0.5, (2, 2, 1, 1))
    save_plain_checkpoint(model, tmp_path / 'pruned.pth')
    state = torch.load(tmp_path / 'pruned.pth', weights_only=True)['state_dict']
    assert list(state) == list(model.state_dict())


def test_the_checkpoint_loads_where_mmsmart_is_not_installed(tmp_path):
    model = pruned()
    save_plain_checkpoint(model, tmp_path / 'pruned.pth', {'dataset_meta': {'classes': ('a',)}})
    zeros = sum(int((p == 0).sum()) for p in model.state_dict().values())
    script = textwrap.dedent("""
        import sys
        sys.modules['mmsmart'] = None  # importing it is an error
        import torch
        from torch import nn
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        checkpoint = torch.load('pruned.pth', weights_only=True)
        model.load_state_dict(checkpoint['state_dict'], strict=True)
        assert checkpoint['meta'] == {'dataset_meta': {'classes': ['a']}}
        assert not [name for name in sys.modules if name.startswith('mmsmart.')]
        print(sum(int((p == 0).sum()) for p in model.state_dict().values()))
    """)
    done = subprocess.run(
        [sys.executable, '-I', '-c', script],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == zeros > 0


def test_the_checkpoint_is_no_larger_than_the_stock_one(tmp_path):
    model = pruned()
    save_plain_checkpoint(model, tmp_path / 'pruned.pth')
    torch.save({'state_dict': stock().state_dict(), 'meta': {}}, tmp_path / 'stock.pth')
    ours, theirs = ((tmp_path / name).stat().st_size for name in ('pruned.pth', 'stock.pth'))
    assert ours <= theirs + 1024


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = pruned()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_plain_checkpoint(model, tmp_path / 'pruned.pth')
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_arrays_in_meta_become_plain(tmp_path):
    meta = {
        'palette': np.array([[1, 2, 3]], dtype=np.uint8),
        'score': np.float32(0.5),
        'thresholds': torch.tensor([0.25, 0.5]),
        'where': tmp_path,
    }
    save_plain_checkpoint(stock(), tmp_path / 'a.pth', meta)
    assert torch.load(tmp_path / 'a.pth', weights_only=True)['meta'] == {
        'palette': [[1, 2, 3]],
        'score': 0.5,
        'thresholds': [0.25, 0.5],
        'where': str(tmp_path),
    }


# Whole files or none


@pytest.mark.parametrize('as_string', [False, True])
def test_a_complete_file_appears_under_its_name_alone(tmp_path, as_string):
    path = tmp_path / 'pruned.pth'
    save_plain_checkpoint(stock(), str(path) if as_string else path)
    assert files(tmp_path) == ['pruned.pth']


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match='disk'), complete_or_absent(tmp_path / 'a.json') as path:
        path.write_text('{"half": ')
        raise RuntimeError('disk full')
    assert files(tmp_path) == []


def test_a_save_that_fails_leaves_the_old_file_untouched(tmp_path):
    save_plain_checkpoint(stock(), tmp_path / 'pruned.pth')
    old = (tmp_path / 'pruned.pth').read_bytes()

    class Model(nn.Linear):
        def state_dict(self):
            return {'weight': torch.zeros(3), (i for i in range(3)): torch.zeros(3)}

    with pytest.raises(TypeError, match='pickle'):
        save_plain_checkpoint(Model(2, 2), tmp_path / 'pruned.pth')
    assert (tmp_path / 'pruned.pth').read_bytes() == old
    assert files(tmp_path) == ['pruned.pth']


def test_a_new_file_replaces_the_old_one_only_when_it_is_complete(tmp_path):
    target = tmp_path / 'report.json'
    target.write_text('old')
    with complete_or_absent(target) as path:
        path.write_text('new')
        assert target.read_text() == 'old'
        assert path.parent == target.parent  # so that renaming it is one atomic step
        assert path.suffix == target.suffix  # writers choose their format by it
    assert target.read_text() == 'new'
    assert files(tmp_path) == ['report.json']


def test_writers_of_one_file_do_not_share_a_temporary_whatever_their_process_number(tmp_path):
    with (
        complete_or_absent(tmp_path / 'a.json') as first,
        complete_or_absent(tmp_path / 'a.json') as second,
    ):
        first.write_text('first')
        second.write_text('second')
    assert (tmp_path / 'a.json').read_text() == 'first'
    assert files(tmp_path) == ['a.json']


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), complete_or_absent(tmp_path / 'a.json'):
        pass


# Plain values

numbers = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text()
)
values = st.recursive(
    numbers,
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=10,
)


@given(values)
def test_plain_values_stay_what_they_are(value):
    assert plain(value) == value


@given(values)
def test_plain_of_plain_is_plain(value):
    wrapped = {'tuple': (value, value), 1: np.array([1, 2]), 'scalar': np.int64(3)}
    once = plain(wrapped)
    assert once == plain(once) == {'tuple': [value, value], '1': [1, 2], 'scalar': 3}
    assert type(once['scalar']) is int


def test_what_is_no_data_is_named():
    assert plain({'device': torch.device('cpu'), 'dtype': torch.float32}) == {
        'device': 'cpu',
        'dtype': 'torch.float32',
    }


# Graphs for other runtimes


class Two(nn.Module):
    """Two outputs, as the raw forward of a detector has several."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        maps = self.net(images)
        return maps, maps.mean((2, 3))


class Forgetful(nn.Module):
    """Computes something else on every call: no graph is true to it."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return (images * self.calls,)


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
    pytest.importorskip('onnxruntime')
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    model = Two(pruned()).eval()
    difference = save_onnx(model, torch.randn(1, 3, 8, 8), path, ['maps', 'means'], True)
    return model, path, difference


class Logarithm(nn.Module):
    def forward(self, images):
        return images + 1, images.log()


def test_onnx_runtime_computes_what_the_model_computes(onnx_file):
    import onnxruntime

    model, path, difference = onnx_file
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    images = torch.randn(5, 3, 8, 8)  # any number of images
    maps, means = session.run(['maps', 'means'], {'images': images.numpy()})
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(torch.from_numpy(maps), expected[0])
    torch.testing.assert_close(torch.from_numpy(means), expected[1])
    assert 0 <= difference <= 1e-4


def test_zero_blocks_are_zero_in_the_onnx_file(onnx_file):
    """Also in the convolution that the batch norm behind it is folded into."""
    onnx = pytest.importorskip('onnx')
    model, path, _ = onnx_file
    graph = onnx.load(path).graph
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    assert 'BatchNormalization' not in {node.op_type for node in graph.node}
    for key, weight in model.named_parameters():
        if weight.ndim == 4:
            assert np.array_equal(stored[key] == 0, weight.detach().numpy() == 0)
            assert (stored[key] == 0).any()


def test_an_exported_program_computes_what_the_model_computes(tmp_path):
    model, images = Two(pruned()).eval(), torch.randn(1, 3, 8, 8)
    difference = save_exported_program(model, images, tmp_path / 'model.pt2')
    maps, _ = torch.export.load(tmp_path / 'model.pt2').module()(images)
    torch.testing.assert_close(maps, model(images)[0])
    assert 0 <= difference <= 1e-4
    assert files(tmp_path) == ['model.pt2']


def test_an_onnx_file_that_computes_something_else_is_not_kept(tmp_path):
    pytest.importorskip('onnxruntime')
    with pytest.raises(ArithmeticError, match=r'model.onnx: its outputs differ .* not kept'):
        save_onnx(Forgetful(), torch.ones(1, 1, 2, 2), tmp_path / 'model.onnx', ['out'])
    assert files(tmp_path) == []


def test_an_exported_program_that_computes_something_else_is_not_kept(tmp_path):
    with pytest.raises(ArithmeticError, match=r'model.pt2: its outputs differ .* not kept'):
        save_exported_program(Forgetful(), torch.ones(1, 1, 2, 2), tmp_path / 'model.pt2')
    assert files(tmp_path) == []


def test_outputs_that_are_not_a_number_agree_with_nothing():
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    for ours, theirs in (((good, good), (good, bad)), ((bad, good), (good, good))):
        assert math.isnan(largest_difference(ours, theirs))
    with pytest.raises(ArithmeticError, match='differ from the model by nan'):
        expect_at_most(1e-4, largest_difference((good, good), (good, bad)), 'model.onnx')


def test_an_onnx_file_that_gives_no_number_is_not_kept(tmp_path):
    pytest.importorskip('onnxruntime')
    model = Logarithm()
    with pytest.raises(ArithmeticError, match=r'model.onnx: its outputs differ .* not kept'):
        save_onnx(model, -torch.ones(1, 1, 2, 2), tmp_path / 'model.onnx', ['same', 'logarithm'])
    assert files(tmp_path) == []


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'not installed. Install it: pip install onnx'):
        save_onnx(Two(stock()), torch.ones(1, 3, 8, 8), tmp_path / 'model.onnx', ['a', 'b'])
    assert files(tmp_path) == []
