"""Tests of mmsmart.blocks: which weights are cut into blocks, and how."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmsmart.blocks import find_layers

few = settings(max_examples=40)


def cut(module, block, **kwargs):
    """Find the one layer of a network of one layer."""
    (layer,), _ = find_layers(nn.ModuleDict({'layer': module}), block, **kwargs)
    return layer


def reasons(model, block=(2, 2, 1, 1), **kwargs):
    _, excluded = find_layers(model, block, **kwargs)
    return {item.name: item.reason for item in excluded}


def upstream(config):
    """Build the stock model of an OpenMMLab config, by that package's own registry."""
    from importlib import import_module

    from mmengine.hub import get_config

    package = config.partition('::')[0]
    cfg = get_config(config).model
    return import_module(f'{package}.registry').MODELS.build({**cfg, '_scope_': package})


def wide_parameters(model):
    """Name every weight of two or more axes once for each module that owns it."""
    return {
        name if key == 'weight' else f'{name}.{key}'
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def assert_all_accounted_for(model, layers, excluded):
    cut_names = [layer.name for layer in layers]
    dense_names = [item.name for item in excluded]
    assert sorted(cut_names + dense_names) == sorted(wide_parameters(model))
    weights = [id(layer.weight) for layer in layers]
    assert len(set(weights)) == len(weights)
    assert all(item.reason for item in excluded)


# Which weights


@st.composite
def modules(draw):
    axes = draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(['linear', 'conv', 'transposed', 'embedding', 'norm', 'attention']))
    if kind == 'linear':
        module = nn.Linear(draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    elif kind == 'embedding':
        module = nn.Embedding(5, 4)
    elif kind == 'norm':
        module = nn.LayerNorm((4, 4))
    elif kind == 'attention':
        module = nn.MultiheadAttention(4, 2)
    else:
        cls = getattr(nn, f'Conv{"Transpose" if kind == "transposed" else ""}{axes}d')
        groups = draw(st.integers(1, 3))
        inputs, outputs = (groups * draw(st.integers(1, 5)) for _ in range(2))
        module = cls(inputs, outputs, kernel, groups=groups)
        if draw(st.booleans()):
            module = parametrizations.weight_norm(module)
    if draw(st.integers(0, 3)) == 0:
        module.requires_grad_(False)
    return module


@few
@given(st.lists(modules(), max_size=6), st.booleans())
def test_every_wide_weight_is_either_a_layer_or_excluded_with_a_reason(found, tie):
    model = nn.ModuleList([nn.Linear(6, 6), *found])
    if tie:
        model.append(nn.Linear(6, 6))
        model[-1].weight = model[0].weight
    layers, excluded = find_layers(model, (-1, 1, 1, 1))
    assert_all_accounted_for(model, layers, excluded)


@pytest.mark.filterwarnings('ignore')  # OpenMMLab's own, at import
@pytest.mark.parametrize(
    ('config', 'pruned', 'dense', 'why'),
    [
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', 21, 0, None),
        ('mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py', 36, 17, 'depthwise'),
        ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', 53, 12, 'WindowMSA is not'),
    ],
)
def test_stock_classifiers_are_accounted_for(config, pruned, dense, why):
    pytest.importorskip('mmpretrain')
    model = upstream(config)
    layers, excluded = find_layers(model)
    assert_all_accounted_for(model, layers, excluded)
    assert (len(layers), len(excluded)) == (pruned, dense)
    assert all(item.reason.startswith(why) for item in excluded)


@pytest.mark.filterwarnings('ignore')  # OpenMMLab's own, at import
def test_every_convolution_of_a_stock_detector_is_cut():
    pytest.importorskip('mmcv._ext')
    pytest.importorskip('mmdet')
    model = upstream('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')
    layers, excluded = find_layers(model)
    assert_all_accounted_for(model, layers, excluded)
    assert (len(layers), len(excluded)) == (83, 0)


def test_layers_stand_in_the_order_of_the_model():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 4)
    )
    layers, _ = find_layers(model, (2, 2))
    assert [layer.name for layer in layers] == ['0', '1.0', '2']


def test_nothing_in_the_model_changes():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_layers(model, (2, 2, 1, 1))
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_layer_used_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    layers, excluded = find_layers(nn.Sequential(shared, nn.ReLU(), shared), (2, 2))
    assert [layer.name for layer in layers] == ['0']
    assert excluded == []


def test_a_tied_weight_is_cut_once_and_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    layers, excluded = find_layers(model, (2, 2))
    assert [layer.name for layer in layers] == ['0']
    assert [(item.name, item.reason) for item in excluded] == [('1', 'the weight is shared with 0')]


def test_a_linear_layer_tied_to_an_embedding_stays_dense():
    model = nn.ModuleDict(
        {'embed': nn.Embedding(6, 4), 'mlp': nn.Linear(4, 4), 'decode': nn.Linear(4, 6)}
    )
    model['decode'].weight = model['embed'].weight
    layers, _ = find_layers(model, (2, 2))
    assert [layer.name for layer in layers] == ['mlp']
    assert reasons(model)['decode'] == 'the weight is shared with embed'


def test_a_rule_that_excludes_a_weight_excludes_every_layer_tied_to_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    layers, _ = find_layers(model, (2, 2), [dict(pattern='0', exclude=True)])
    assert [layer.name for layer in layers] == ['2']


def test_a_frozen_weight_stays_dense():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    assert reasons(model) == {'0': 'frozen: the weight does not require a gradient'}


@pytest.mark.parametrize('multiplier', [1, 2])
def test_a_depthwise_convolution_stays_dense(multiplier):
    model = nn.Sequential(nn.Conv2d(4, 4 * multiplier, 3, groups=4), nn.Linear(4, 4))
    assert reasons(model) == {'0': 'depthwise: a filter that is one channel deep holds no block'}


def test_a_convolution_with_one_output_a_group_is_not_depthwise():
    layer = cut(nn.Conv2d(16, 4, 3, groups=4), (1, 2, 1, 1))
    assert (layer.num_blocks, layer.weight_block) == (4 * 2 * 9, (1, 2, 1, 1))


@pytest.mark.parametrize(
    'normalise',
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated'),
        ),
        nn.utils.spectral_norm,
        lambda module: prune.identity(module, 'weight'),
    ],
    ids=['weight_norm', 'spectral_norm', 'old weight_norm', 'old spectral_norm', 'torch prune'],
)
def test_a_parametrised_weight_stays_dense(normalise):
    model = nn.Sequential(normalise(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    layers, _ = find_layers(model, (2, 2, 1, 1))
    assert [layer.name for layer in layers] == ['1']
    found = reasons(model)
    assert found
    assert set(found.values()) == {
        'the weight is computed from other parameters (a parametrization)'
    }


@pytest.mark.filterwarnings('ignore')  # OpenMMLab's own, at import
@pytest.mark.parametrize('name', ['ConvWS2d', 'ConvAWS2d'])
def test_a_weight_standardised_convolution_stays_dense(name):
    mmcv_cnn = pytest.importorskip('mmcv.cnn')
    standardised = getattr(mmcv_cnn, name)
    subclass = type('Derived', (standardised,), {})
    model = nn.Sequential(standardised(4, 4, 3), subclass(4, 4, 3), nn.Conv2d(4, 4, 3))
    why = 'weight standardisation turns pruned zeros into other values'
    assert reasons(model) == {'0': why, '1': why}


@pytest.mark.filterwarnings('ignore')  # OpenMMLab's own, at import
@pytest.mark.parametrize(
    ('package', 'name'),
    [
        ('mmcv.ops', 'DeformConv2d'),
        ('mmcv.ops', 'DeformConv2dPack'),
        ('mmcv.ops', 'ModulatedDeformConv2d'),
        ('mmcv.ops', 'ModulatedDeformConv2dPack'),
        ('torchvision.ops', 'DeformConv2d'),
    ],
)
def test_a_deformable_convolution_is_cut_like_an_ordinary_one(package, name):
    if package == 'mmcv.ops':
        pytest.importorskip('mmcv._ext', reason='deformable convolutions are compiled ops of mmcv')
    ops = pytest.importorskip(package)
    model = nn.ModuleDict({'layer': getattr(ops, name)(8, 12, 3, padding=1, groups=2)})
    layers, excluded = find_layers(model, (2, 4, 1, 1))
    assert_all_accounted_for(model, layers, excluded)
    plain = cut(nn.Conv2d(8, 12, 3, groups=2), (2, 4, 1, 1))
    assert excluded == []
    assert (layers[0].name, layers[0].num_blocks) == ('layer', plain.num_blocks)
    spread = torch.arange(plain.num_blocks).float()
    assert torch.equal(layers[0].expand(spread), plain.expand(spread))


def test_a_weight_that_is_no_layers_weight_is_named_by_its_key():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 3))

    model = nn.ModuleDict({'bias': Table(), 'linear': nn.Linear(4, 4)})
    assert reasons(model) == {'bias.table': 'Table is not a convolution or linear layer'}


# How they are cut


@pytest.mark.parametrize('axes', [1, 2, 3])
def test_a_block_is_out_by_in_for_a_convolution_of_any_rank(axes):
    layer = cut(getattr(nn, f'Conv{axes}d')(8, 16, 3), (4, 2, 1, 3))
    assert layer.weight_block == (4, 2, 1, 3, 3)[: 2 + axes]
    assert layer.num_blocks == 4 * 4 * (3, 3, 3)[axes - 1]


@pytest.mark.parametrize('axes', [1, 2, 3])
def test_a_block_is_out_by_in_for_a_transposed_convolution_too(axes):
    """One output channel, as the user wrote it, is a column of the transposed weight."""
    module = getattr(nn, f'ConvTranspose{axes}d')(8, 6, 3)
    layer = cut(module, (1, -1, -1, -1))
    assert layer.num_blocks == 6
    for channel in range(6):
        spread = layer.expand(torch.eye(6)[channel])
        assert bool((spread[:, channel] == 1).all())
        assert spread.sum() == 8 * 3**axes


def test_a_block_drops_its_kernel_for_a_linear_layer():
    layer = cut(nn.Linear(8, 16), (4, 2, 3, 3))
    assert (layer.weight_block, layer.num_blocks) == ((4, 2), 16)


def test_minus_one_is_the_whole_axis():
    layer = cut(nn.Conv2d(10, 6, 5), (1, -1, -1, -1))
    assert (layer.block, layer.num_blocks) == ((1, 10, 5, 5), 6)
    assert layer.sizes().tolist() == [250] * 6


def test_blocks_at_the_edge_are_smaller():
    layer = cut(nn.Linear(10, 6), (4, 8))
    assert layer.sizes().tolist() == [32, 8, 16, 4]


conv_like = st.tuples(
    st.sampled_from([nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d]),
    st.integers(1, 3),  # groups
    st.integers(2, 7),  # input channels of a group
    st.integers(1, 7),  # output channels of a group
    st.integers(1, 3),  # kernel
    st.tuples(*[st.sampled_from([-1, 1, 2, 3]) for _ in range(4)]),
)


def build(case):
    cls, groups, inputs, outputs, kernel, block = case
    module = cls(groups * inputs, groups * outputs, kernel, groups=groups).double()
    big = cls(8, 8, 3, groups=1).double()  # so that no block is larger than every layer
    (layer, _), _ = find_layers(nn.ModuleList([module, big]), block)
    return layer


@few
@given(conv_like)
def test_block_sizes_sum_to_the_number_of_weights(case):
    layer = build(case)
    assert layer.sizes().shape == (layer.num_blocks,)
    assert int(layer.sizes().sum()) == layer.weight.numel()
    assert int(layer.sizes().min()) >= 1


@few
@given(conv_like)
def test_reduce_is_the_adjoint_of_expand(case):
    """<reduce(x), v> = <x, expand(v)>; whole numbers in float64, so to the last bit."""
    layer = build(case)
    x = torch.randint(-9, 10, layer.weight.shape).double()
    v = torch.randint(-9, 10, (layer.num_blocks,)).double()
    assert layer.expand(v).shape == layer.weight.shape
    assert torch.dot(layer.reduce(x), v) == (x * layer.expand(v)).sum()


@few
@given(conv_like)
def test_reduce_of_ones_counts_the_weights_of_each_block(case):
    layer = build(case)
    assert torch.equal(layer.reduce(torch.ones_like(layer.weight)).long(), layer.sizes())


@few
@given(conv_like)
def test_no_block_straddles_two_groups(case):
    groups = case[1]
    layer = build(case)
    ids = layer.expand(torch.arange(layer.num_blocks).double())
    # PyTorch keeps the groups one after the other along the first axis of either kind of weight.
    seen = [set(part.flatten().tolist()) for part in ids.chunk(groups)]
    assert sum(len(part) for part in seen) == len(set().union(*seen)) == layer.num_blocks
    assert layer.groups == groups


def test_the_blocks_of_a_layer_are_boxes_in_row_major_order():
    layer = cut(nn.Linear(4, 3), (2, 3))
    ids = layer.expand(torch.arange(4.0))
    assert ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [2, 2, 2, 3]]


def test_a_map_has_a_row_for_each_block_of_outputs():
    layer = cut(nn.Conv2d(4, 6, (1, 2)), (2, 2, 1, 1))
    values = torch.zeros(3, 2, 1, 2)
    values[2, 0] = torch.tensor([1.0, 0.0])  # half of the positions of one pair
    values[0, 1] = 1.0
    assert layer.map_of(values.flatten()).tolist() == [[0, 1], [0, 0], [0.5, 0]]


def test_a_map_of_a_transposed_convolution_is_turned_to_outputs_by_inputs():
    layer = cut(nn.ConvTranspose2d(4, 6, 1), (2, 2, 1, 1))
    values = layer.reduce(torch.arange(6.0).view(1, 6, 1, 1).expand(4, 6, 1, 1))
    assert layer.map_of(values).tolist() == [[2.0, 2.0], [10.0, 10.0], [18.0, 18.0]]


def test_a_map_of_a_grouped_convolution_stacks_the_groups():
    layer = cut(nn.Conv2d(4, 4, 1, groups=2), (1, 1, 1, 1))
    assert layer.map_of(torch.arange(8.0)).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


# Rules by name


@pytest.fixture
def net():
    return nn.ModuleDict(
        {
            'backbone': nn.ModuleDict(
                {'layer1': nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), 'fc': nn.Linear(8, 8)}
            ),
            'head': nn.Linear(8, 4),
        }
    )


def blocks_by_name(net, rules):
    layers, _ = find_layers(net, (4, 4), rules)
    return {layer.name: layer.block for layer in layers}


def test_a_rule_without_wildcard_covers_the_name_and_all_below_it(net):
    names = blocks_by_name(net, [dict(pattern='backbone.layer1', block=(2, 2))])
    assert names == {
        'backbone.layer1.0': (2, 2),
        'backbone.layer1.1': (2, 2),
        'backbone.fc': (4, 4),
        'head': (4, 4),
    }


def test_a_name_is_not_a_prefix_of_a_longer_name(net):
    net['header'] = nn.Linear(8, 8)
    names = blocks_by_name(net, [dict(pattern='head', exclude=True)])
    assert 'head' not in names
    assert 'header' in names


def test_a_wildcard_rule_covers_what_matches(net):
    names = blocks_by_name(net, [dict(pattern='*.layer?.0', block=(8, -1))])
    assert names['backbone.layer1.0'] == (8, 8)
    assert names['backbone.layer1.1'] == (4, 4)


def test_later_rules_win(net):
    names = blocks_by_name(
        net,
        [
            dict(pattern='backbone', block=(2, 2), exclude=True),
            dict(pattern='backbone.layer1.*', exclude=False),
            dict(pattern='backbone.layer1.1', block=(1, 1)),
        ],
    )
    assert names == {'backbone.layer1.0': (2, 2), 'backbone.layer1.1': (1, 1), 'head': (4, 4)}


def test_an_excluded_layer_says_so(net):
    rules = [dict(pattern='head', exclude=True)]
    assert reasons(net, overrides=rules) == {'head': 'excluded by a rule of `layers`'}


# What is refused


def refusal(*args, **kwargs):
    with pytest.raises(ValueError) as error:
        find_layers(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize('entry', [0, -2, 1.5, '8', True, None])
def test_a_block_entry_that_is_no_size_is_refused(entry):
    message = refusal(nn.Linear(8, 8), (4, entry))
    assert message.startswith('block: every entry')
    assert 'at least 1, or -1 for the whole axis' in message
    assert message.endswith(f'got {entry!r}.')


@pytest.mark.parametrize('block', [8, 'channels', (4,), None])
def test_a_block_that_is_no_shape_is_refused(block):
    message = refusal(nn.Linear(8, 8), block)
    assert message.startswith('block: ') and '(out, in, kh, kw)' in message
    assert repr(block) in message


@pytest.mark.parametrize(
    ('block', 'entry', 'largest'),
    [((4096, 4, 1, 1), 4096, 16), ((4, 64, 1, 1), 64, 32), ((4, 4, 7, 7), 7, 3)],
)
def test_a_block_larger_than_every_layer_is_refused(block, entry, largest):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(32, 8, 2), nn.Linear(16, 10))
    message = refusal(model, block)
    assert f'block: {entry} in {block} is larger than every layer' in message
    assert f'at most {largest}' in message
    assert '-1 for a whole axis' in message


def test_a_block_needs_only_one_layer_as_large_along_each_axis():
    """The default block fits a net whose stem is 3 channels deep and whose head is 10 wide."""
    layers, _ = find_layers(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(16, 10)))
    assert [layer.block for layer in layers] == [(16, 3, 1, 1), (10, 8)]


def test_a_rule_with_a_block_larger_than_its_layers_is_refused(net):
    message = refusal(net, (4, 4), [dict(pattern='head', block=(8, 4))])
    assert 'block: 8 in (8, 4) is larger than every layer it applies to' in message


def test_a_block_of_a_rule_is_named_as_the_rules(net):
    with pytest.raises(ValueError, match=r'^layers\[1\]\.block: 4096 in .* is larger'):
        find_layers(
            net, (4, 4, 1, 1),
            [dict(pattern='*', min_density=0.1), dict(pattern='*', block=(4096, 4, 1, 1))],
        )  # fmt: skip


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        (dict(pattern='*', exclude=True), 'layers: expected a list of rules'),
        (['*'], r"layers\[0\]: expected a dict .* got '\*'"),
        ([dict(pattern=3, exclude=True)], r'layers\[0\]\.pattern: expected a name .* got 3'),
        ([dict(pattern='*', exclude='no')], r"layers\[0\]\.exclude: expected True .* got 'no'"),
    ],
)
def test_a_rule_of_another_kind_is_refused(net, rules, message):
    with pytest.raises(ValueError, match=message):
        find_layers(net, (4, 4, 1, 1), rules)


def test_a_rule_that_matches_nothing_is_refused_with_names_to_choose_from(net):
    message = refusal(net, (4, 4), [dict(pattern='neck.*', exclude=True)])
    assert "layers: the pattern 'neck.*' matches no layer" in message
    assert "'backbone.layer1.0'" in message
    assert "'head'" in message


def test_a_rule_that_matches_only_modules_without_weights_is_refused():
    model = nn.ModuleDict({'act': nn.ReLU(), 'fc': nn.Linear(4, 4)})
    assert "'act' matches no layer" in refusal(model, (2, 2), [dict(pattern='act', exclude=True)])


@pytest.mark.parametrize(
    'rule', [dict(pattern='head', blocks=(2, 2)), dict(exclude=True), dict(pattern='head'), {}]
)
def test_a_rule_with_other_keys_is_refused(net, rule):
    message = refusal(net, (4, 4), [dict(pattern='backbone', exclude=True), rule])
    assert message.startswith('layers[1]: expected `pattern` and at least one of')
    assert str(sorted(rule)) in message


def test_a_bad_block_in_a_rule_is_refused_under_its_own_name(net):
    message = refusal(net, (4, 4), [dict(pattern='head', block=(0, 4))])
    assert message.startswith('layers[0].block: every entry')


def test_a_model_with_nothing_left_to_prune_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=4))
    model[0].requires_grad_(False)
    message = refusal(model, (2, 2))
    assert 'no prunable layer is left in Sequential' in message
    assert 'depthwise' in message
    assert 'frozen' in message
    assert 'Loosen the rules' in message


def test_a_model_without_weights_is_refused():
    assert 'the model has no weights' in refusal(nn.ReLU())
