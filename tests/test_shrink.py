"""Tests of mmsmart.shrink: channels cut out by name, and the file that says which."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.shrink import Kept, cut_channels, read_structure, shrink, structure_of


def net(seed=0):
    """Layers of every kind; only their shapes matter here, nothing runs them in a row."""
    torch.manual_seed(seed)
    return nn.ModuleDict(
        dict(
            plain=nn.Conv2d(3, 8, 3),
            norm=nn.BatchNorm2d(8),
            depthwise=nn.Conv2d(8, 16, 3, groups=8),
            grouped=nn.Conv1d(12, 8, 1, groups=4, bias=False),
            up=nn.ConvTranspose2d(8, 6, 2),
            up_grouped=nn.ConvTranspose3d(4, 6, 1, groups=2),
            linear=nn.Linear(12, 5),
            bare=nn.BatchNorm1d(4, track_running_stats=False),
            other=nn.GroupNorm(2, 8),
        )
    )


def kept(out=None, in_=None):
    return Kept(*(None if x is None else torch.tensor(x) for x in (out, in_)))


STAY = {
    'plain': kept([0, 3, 7]),
    'norm': kept([1, 2]),
    'depthwise': kept([2, 3, 10, 11], [1, 5]),
    'grouped': kept([0, 1, 6, 7], [0, 1, 2, 9, 10, 11]),
    'up': kept([5], [0, 7]),
    'up_grouped': kept([3, 4, 5], [2, 3]),
    'linear': kept(None, [0, 11]),
    'bare': kept([3]),
}


def test_what_stays_is_what_was_there():
    model, cut = net(), net()
    cut_channels(cut, STAY)
    expected = {
        'plain': (model['plain'].weight[[0, 3, 7]], model['plain'].bias[[0, 3, 7]]),
        'norm': (model['norm'].weight[[1, 2]], model['norm'].bias[[1, 2]]),
        'depthwise': tuple(p[[2, 3, 10, 11]] for p in model['depthwise'].parameters()),
        'grouped': (model['grouped'].weight[[0, 1, 6, 7]],),
        'up': (model['up'].weight[[0, 7]][:, [5]], model['up'].bias[[5]]),
        'up_grouped': (model['up_grouped'].weight[[2, 3]], model['up_grouped'].bias[[3, 4, 5]]),
        'linear': (model['linear'].weight[:, [0, 11]], model['linear'].bias),
        'bare': (model['bare'].weight[[3]], model['bare'].bias[[3]]),
        'other': tuple(model['other'].parameters()),
    }
    for name, parameters in expected.items():
        for mine, theirs in zip(cut[name].parameters(), parameters, strict=True):
            assert torch.equal(mine, theirs), name
    assert cut['norm'].running_mean.shape == cut['norm'].running_var.shape == (2,)


def test_layers_say_how_many_channels_they_have_left():
    model = net()
    cut_channels(model, STAY)
    sizes = {
        name: (layer.in_channels, layer.out_channels, layer.groups)
        for name, layer in model.items()
        if hasattr(layer, 'groups')
    }
    assert sizes == {
        'plain': (3, 3, 1),
        'depthwise': (2, 4, 2),
        'grouped': (6, 4, 2),
        'up': (2, 1, 1),
        'up_grouped': (2, 3, 1),
    }
    assert (model['linear'].in_features, model['linear'].out_features) == (2, 5)
    assert (model['norm'].num_features, model['bare'].num_features) == (2, 1)
    for name, shape in dict(
        plain=(1, 3, 5, 5), depthwise=(1, 2, 5, 5), grouped=(1, 6, 4), up=(1, 2, 4, 4),
        up_grouped=(1, 2, 2, 2, 2), linear=(1, 2), norm=(2, 2, 3, 3), bare=(2, 1),
    ).items():  # fmt: skip
        model[name](torch.randn(shape))


def test_frozen_parameters_stay_frozen():
    model = net()
    model['plain'].weight.requires_grad_(False)
    cut_channels(model, STAY)
    assert [p.requires_grad for p in model['plain'].parameters()] == [False, True]


# The file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'structure.json'
    path.write_text(json.dumps(structure_of(net(), STAY)))
    return path


def test_a_structure_that_was_written_makes_the_same_model(file):
    cut, shrunk = net(), net()
    cut_channels(cut, STAY)
    shrink(shrunk, read_structure(file), file)
    assert str(cut) == str(shrunk)
    shrunk.load_state_dict(cut.state_dict(), strict=True)


def test_a_missing_file_is_said_to_be_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'structure\.json that was written with it'):
        read_structure(tmp_path / 'structure.json')


@pytest.mark.parametrize('share', [0, 0.3, 0.99])
def test_a_file_that_was_cut_short_is_refused(file, share):
    text = file.read_text()
    file.write_text(text[: int(share * len(text))])
    with pytest.raises(ValueError, match=r'structure\.json: not JSON, or cut short'):
        read_structure(file)


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'[' * 10**5, b'9' * 10**5, b'PK\x03\x04'])
def test_a_file_of_another_kind_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r'structure\.json: not JSON'):
        read_structure(file)


def changed(**fields):
    return lambda structure: {**structure, **fields}


def changed_layer(name, **fields):
    def change(structure):
        structure['layers'][name].update(fields)
        return structure

    return change


WRONG = {
    'a list': (lambda s: [s], 'format: expected'),
    'another format': (changed(format='coco'), 'format: expected'),
    'a newer version': (changed(version=2), 'version: got 2, known is 1'),
    'no layers': (changed(layers={}), 'layers: expected an object'),
    'layers in a list': (changed(layers=[1]), 'layers: expected an object'),
    'a layer that is no object': (
        changed(layers={'plain': 3}),
        'layers.plain: expected the fields',
    ),
    'a further field': (changed_layer('plain', kernel=3), 'layers.plain: expected the fields'),
    'no shape': (changed_layer('plain', shape=None), 'layers.plain.shape: expected a list'),
    'no channel': (changed_layer('plain', out=[]), 'layers.plain.out: expected a list'),
    'negative': (changed_layer('plain', out=[-1, 2]), 'layers.plain.out: expected a list'),
    'fractions': (changed_layer('plain', out=[0.5]), 'layers.plain.out: expected a list'),
    'truths': (changed_layer('plain', out=[True]), 'layers.plain.out: expected a list'),
    'endless': (changed_layer('plain', out=[10**30]), 'layers.plain.out: expected a list'),
    'twice': (changed_layer('plain', out=[1, 1]), 'layers.plain.out: channels must rise'),
    'falling': (changed_layer('plain', out=[2, 1]), 'layers.plain.out: channels must rise'),
    'out of range': (changed_layer('plain', out=[8]), 'channel 8, but the layer has 8'),
    'inputs of a norm': (changed_layer('norm', **{'in': [0]}), 'channel 0, but the layer has 0'),
    'of another shape': (changed_layer('plain', shape=[8, 3, 1, 1]), 'structure of another config'),
    'a layer that is not there': (
        changed(layers={'stem': {'shape': [1], 'out': None, 'in': None}}),
        'layers.stem: the model has no such layer to cut',
    ),
    'a layer that can not be cut': (
        changed(layers={'other': {'shape': [8], 'out': [0], 'in': None}}),
        'layers.other: the model has no such layer to cut',
    ),
    'part of a group': (changed_layer('grouped', out=[0, 1, 6]), 'loses whole groups of output'),
    'other groups': (changed_layer('grouped', out=[0, 1, 4, 5]), 'loses whole groups of output'),
    'one side of groups': (changed_layer('depthwise', out=None), 'loses whole groups of output'),
}


@pytest.mark.parametrize(('change', 'message'), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_structure_is_refused_by_its_field(file, change, message):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    model = net()
    with pytest.raises(ValueError, match=message) as error:
        shrink(model, read_structure(file), file)
    assert str(error.value).startswith(str(file))
    assert str(model) == str(net()), 'something was cut before'


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
channels = st.one_of(st.none(), st.lists(st.integers(0, 16), max_size=8, unique=True).map(sorted))
names = st.sampled_from([*STAY, 'other', '', 'stem', 'plain.weight'])


@st.composite
def structures(draw):
    """A right structure with some of its fields changed, or taken away."""
    structure = structure_of(net(), STAY)
    for _ in range(draw(st.integers(0, 3))):
        row = structure['layers'].setdefault(draw(names), {'shape': [8], 'out': None, 'in': None})
        row[draw(st.sampled_from(['shape', 'out', 'in', 'x']))] = draw(
            st.one_of(channels, anything)
        )
    if draw(st.booleans()):
        structure[draw(st.sampled_from(['format', 'version', 'layers']))] = draw(anything)
    if draw(st.booleans()):
        structure['layers'] = {draw(names): draw(anything)}
    return structure


@settings(max_examples=150)
@given(st.one_of(structures(), anything))
def test_a_hostile_file_is_refused_or_makes_a_model_no_larger(tmp_path_factory, structure):
    path = tmp_path_factory.getbasetemp() / 'hostile.json'
    path.write_text(json.dumps(structure))
    model = net()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    try:
        shrink(model, read_structure(path), path)
    except ValueError:
        return
    for name, parameter in model.named_parameters():
        assert all(0 < new <= old for new, old in zip(parameter.shape, shapes[name], strict=True))
    for layer in model.values():
        if hasattr(layer, 'groups'):
            assert layer.weight.numel() * layer.groups == (
                layer.in_channels * layer.out_channels * layer.weight[0, 0].numel()
            )


@settings(max_examples=100)
@given(st.binary(max_size=50), st.integers(0, 400))
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, damage, at):
    path = tmp_path_factory.getbasetemp() / 'damaged.json'
    text = json.dumps(structure_of(net(), STAY)).encode()
    path.write_bytes(text[:at] + damage + text[at + len(damage) :])
    try:
        shrink(copy.deepcopy(net()), read_structure(path), path)
    except ValueError as error:
        assert str(error).startswith(str(path))
