"""Tests of mmsmart.channels: on every network, cutting is what setting to zero is."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.channels import find_channels, pruned_weights
from mmsmart.cost import count_positions, coupled_cost
from mmsmart.shrink import cut_channels

OUTPUT = 'its output channels are outputs of the model'
CHANGED = 'cutting the channels that meet here would change the outputs'


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs, outputs, size=3, **settings):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


def frozen(layer):
    return layer.requires_grad_(False)


def chain(n, x):
    return n.c(n.b(n.norm(n.a(x)).relu()).relu())


def around(middle):
    """Three layers, with something done to the channels between the first two."""
    return lambda n, x: n.c(n.b(middle(n.norm(n.a(x)).sigmoid())).relu())


def folded(x):
    return x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])


def gated(x):
    halves = folded(x)
    return halves[:, 0] * halves[:, 1].sigmoid()


def gated_by_chunks(x):
    value, gate = x.chunk(2, 1)
    return value * gate.sigmoid()


def shuffled(x):
    return folded(x).transpose(1, 2).reshape(x.shape)


def three(between=8, norm=nn.BatchNorm2d, **layers):
    """Layers `a`, `norm`, `b` and `c`; `b` takes as many channels as it is told."""
    return dict(
        a=conv(3, 8), norm=norm(8), b=conv(between, 6), c=nn.Conv2d(6, 4, 1)
    ) | layers  # fmt: skip


# Name: the network; its groups as (first layer, layers, units); what stays whole, and why.
NETS = {
    'conv, norm, relu': (
        lambda: Net(chain, **three()),
        [('a', ('a', 'norm', 'b'), 8), ('b', ('b', 'c'), 6)],
        {'c': OUTPUT},
    ),
    'residual sum': (
        lambda: Net(
            lambda n, x: n.d(n.a(x).relu() + n.norm(n.c(n.b(n.a(x).relu())))),
            a=conv(3, 8), b=conv(8, 4), c=conv(4, 8), norm=nn.BatchNorm2d(8), d=conv(8, 2),
        ),
        [('a', ('a', 'b', 'c', 'norm', 'd'), 8), ('b', ('b', 'c'), 4)],
        {'d': OUTPUT},
    ),
    'concatenation': (
        lambda: Net(
            lambda n, x: n.c(n.norm(torch.cat([n.a(x), n.b(x)], 1)).relu()),
            a=conv(3, 6), b=conv(3, 4), norm=nn.BatchNorm2d(10), c=conv(10, 2),
        ),
        [('a', ('a', 'norm', 'c'), 6), ('b', ('b', 'norm', 'c'), 4)],
        {'c': OUTPUT},
    ),
    'sum and concatenation of the same': (
        lambda: Net(
            lambda n, x: n.d(torch.cat([n.a(x) + n.b(x), n.b(x), n.c(x)], 1).relu()),
            a=conv(3, 6), b=conv(3, 6), c=conv(3, 4), d=conv(16, 2),
        ),
        [('a', ('a', 'b', 'd'), 6), ('c', ('c', 'd'), 4)],
        {'d': OUTPUT},
    ),
    'sum of concatenations': (
        lambda: Net(
            lambda n, x: n.d((torch.cat([n.a(x), n.b(x)], 1) + n.c(x)).relu()),
            a=conv(3, 6), b=conv(3, 4), c=conv(3, 10), d=conv(10, 2),
        ),
        [('a', ('a', 'c', 'd'), 6), ('b', ('b', 'c', 'd'), 4)],
        {'d': OUTPUT},
    ),
    'depthwise': (
        lambda: Net(chain, **three(8, b=conv(8, 8, groups=8), c=nn.Conv2d(8, 4, 1))),
        [('a', ('a', 'norm', 'b', 'c'), 8)],
        {'c': OUTPUT},
    ),
    'depthwise with a multiplier': (
        lambda: Net(chain, **three(8, b=conv(8, 24, groups=8), c=nn.Conv2d(24, 4, 1))),
        [('a', ('a', 'norm', 'b', 'c'), 8)],
        {'c': OUTPUT},
    ),
    'groups': (
        lambda: Net(chain, **three(8, b=conv(8, 12, groups=4, bias=False), c=nn.Conv2d(12, 4, 1))),
        [('a', ('a', 'norm', 'b', 'c'), 4)],
        {'c': OUTPUT},
    ),
    'groups of other groups': (
        lambda: Net(
            lambda n, x: n.d(chain(n, x)),
            **three(8, b=conv(8, 8, groups=4), c=conv(8, 6, groups=2), d=nn.Conv2d(6, 4, 1)),
        ),
        [('a', ('a', 'norm', 'b', 'c', 'd'), 2)],
        {'d': OUTPUT},
    ),
    'transposed': (
        lambda: Net(chain, **three(8, b=nn.ConvTranspose2d(8, 6, 2, 2))),
        [('a', ('a', 'norm', 'b'), 8), ('b', ('b', 'c'), 6)],
        {'c': OUTPUT},
    ),
    'transposed in groups': (
        lambda: Net(chain, **three(8, b=nn.ConvTranspose2d(8, 6, 2, 2, groups=2))),
        [('a', ('a', 'norm', 'b', 'c'), 2)],
        {'c': OUTPUT},
    ),
    'transposed depthwise': (
        lambda: Net(
            chain, **three(8, b=nn.ConvTranspose2d(8, 8, 2, 2, groups=8), c=nn.Conv2d(8, 4, 1))
        ),
        [('a', ('a', 'norm', 'b', 'c'), 8)],
        {'c': OUTPUT},
    ),
    'flattened': (
        lambda: Net(
            lambda n, x: n.c(n.b(F.adaptive_avg_pool2d(n.a(x), 2).flatten(1)).relu()),
            a=conv(3, 8), b=nn.Linear(32, 6), c=nn.Linear(6, 3),
        ),
        [('a', ('a', 'b'), 8), ('b', ('b', 'c'), 6)],
        {'c': OUTPUT},
    ),
    'a head that runs on several inputs': (
        lambda: Net(
            lambda n, x: [n.c(n.b(y).relu()) for y in (n.a(x), F.max_pool2d(n.d(x), 2))],
            a=conv(3, 8), b=conv(8, 6), c=conv(6, 4), d=conv(3, 8),
        ),
        [('a', ('a', 'b', 'd'), 8), ('b', ('b', 'c'), 6)],
        {'c': OUTPUT},
    ),
    'frozen layer': (
        lambda: Net(chain, **three(b=frozen(conv(8, 6)))),
        [],
        {'a': 'tied to b: frozen', 'b': 'frozen: the weight does not require a gradient'},
    ),
    'frozen norm': (
        lambda: Net(chain, **three(norm=lambda n: frozen(nn.BatchNorm2d(n)))),
        [('b', ('b', 'c'), 6)],
        {'a': 'tied to norm: frozen', 'c': OUTPUT},
    ),
    'norm without scale and shift': (
        lambda: Net(chain, **three(norm=lambda n: nn.BatchNorm2d(n, affine=False))),
        [('b', ('b', 'c'), 6)],
        {'a': 'a norm without scale and shift can not silence a channel', 'c': OUTPUT},
    ),
    'group norm': (
        lambda: Net(chain, **three(norm=lambda n: nn.GroupNorm(2, n))),
        [('b', ('b', 'c'), 6)],
        {'a': 'a GroupNorm behind them mixes channels', 'c': OUTPUT},
    ),
    'group norm without scale and shift': (
        lambda: Net(chain, **three(norm=lambda n: nn.GroupNorm(2, n, affine=False))),
        [('b', ('b', 'c'), 6)],
        {'a': CHANGED, 'c': OUTPUT},
    ),
    'layer norm': (
        lambda: Net(
            lambda n, x: n.c(n.norm(n.a(x).mean((2, 3)))),
            a=conv(3, 8), norm=nn.LayerNorm(8), c=nn.Linear(8, 3),
        ),
        [],
        {'a': 'a LayerNorm behind them mixes channels', 'c': OUTPUT},
    ),
    'a parameter of its own': (
        lambda: Net(
            lambda n, x: n.c(n.a(x) * n.scale),
            a=conv(3, 8), scale=nn.Parameter(torch.randn(1, 8, 1, 1)), c=conv(8, 3),
        ),
        [],
        {'a': 'tied to a parameter that belongs to no layer that can be cut', 'c': OUTPUT},
    ),
    'shared weight': (
        lambda: sharing(Net(
            lambda n, x: n.e(n.d(chain(n, x)).relu()),
            **three(b=conv(8, 8), c=conv(8, 8), d=conv(8, 4), e=conv(4, 2)),
        )),
        [('d', ('d', 'e'), 4)],
        {
            'a': 'tied to b: the weight is shared with c', 'b': 'the weight is shared with c',
            'c': 'the weight is shared with b', 'e': OUTPUT,
        },
    ),
    'a layer that does not run': (
        lambda: Net(chain, **three(spare=conv(3, 8))),
        [('a', ('a', 'norm', 'b'), 8), ('b', ('b', 'c'), 6)],
        {'c': OUTPUT, 'spare': 'the traced forward pass does not run it'},
    ),
    'squeeze and excitation': (
        lambda: Net(
            lambda n, x: n.c(n.a(x) * n.e(n.s(n.a(x).mean((2, 3), True)).relu()).sigmoid()),
            a=conv(3, 8), s=nn.Conv2d(8, 4, 1), e=nn.Conv2d(4, 8, 1), c=conv(8, 3),
        ),
        [('a', ('a', 's', 'e', 'c'), 8), ('s', ('s', 'e'), 4)],
        {'c': OUTPUT},
    ),
    'outputs in the middle': (
        lambda: Net(
            lambda n, x: (n.a(x), n.c(n.b(n.a(x)).relu())),
            a=conv(3, 8), b=conv(8, 6), c=conv(6, 3),
        ),
        [('b', ('b', 'c'), 6)],
        {'a': OUTPUT, 'c': OUTPUT},
    ),
    'a sum that is an output': (
        lambda: Net(
            lambda n, x: n.a(x) + n.c(n.b(x).relu()), a=conv(3, 8), b=conv(3, 6), c=conv(6, 8)
        ),
        [('b', ('b', 'c'), 6)],
        {'a': OUTPUT, 'c': OUTPUT},
    ),
    'one dimension': (
        lambda: Net(
            lambda n, x: n.c(n.norm(n.a(x.flatten(2))).relu()),
            a=nn.Conv1d(3, 8, 3), norm=nn.BatchNorm1d(8), c=nn.Conv1d(8, 2, 1),
        ),
        [('a', ('a', 'norm', 'c'), 8)],
        {'c': OUTPUT},
    ),
    # What rules can't see: left whole, and not cut wrongly.
    'channel shuffle': (lambda: Net(around(shuffled), **three()), 'b', {'a': CHANGED}),
    'gate by view': (lambda: Net(around(gated), **three(4)), 'b', {'a': CHANGED}),
    'gate by chunks': (lambda: Net(around(gated_by_chunks), **three(4)), 'b', {'a': CHANGED}),
    'pixel shuffle': (
        lambda: Net(around(lambda x: F.pixel_shuffle(x, 2)), **three(2)),
        'b',
        {'a': 'b does not take them one by one'},
    ),
    'flip': (lambda: Net(around(lambda x: x.flip(1)), **three()), 'b', {'a': CHANGED}),
    'roll': (lambda: Net(around(lambda x: x.roll(3, 1)), **three()), 'b', {'a': CHANGED}),
    'softmax': (lambda: Net(around(lambda x: x.softmax(1)), **three()), 'b', {'a': CHANGED}),
    'every second': (lambda: Net(around(lambda x: x[:, ::2]), **three(4)), 'b', {'a': CHANGED}),
    'divided by the number of channels': (
        lambda: Net(around(lambda x: x / x.shape[1]), **three()), 'b', {'a': CHANGED}
    ),
    'a size by heart': (
        lambda: Net(around(lambda x: x.reshape(-1, 8, *x.shape[2:])), **three()),
        'b',
        {'a': CHANGED},
    ),
    'an error of its own kind': (
        lambda: Net(around(lambda x: {8: x}[x.shape[1]]), **three()), 'b', {'a': CHANGED}
    ),
}  # fmt: skip


def sharing(net):
    net.c.weight = net.b.weight
    return net


def image(size=8):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def forward(net):
    made = net(image())
    return list(made) if isinstance(made, (list, tuple)) else [made]


def telling(net):
    """In eval mode, with running statistics and biases that no mistake would go unseen by."""
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data = torch.randn(module.num_features, generator=generator)
                module.bias.data = torch.randn(module.num_features, generator=generator)
    return net.eval()


def random_mask(groups, seed):
    """Keep at least one unit of every group."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(groups[-1].units.stop, generator=generator) < 0.6
    for group in groups:
        mask[group.units[seed % len(group.units)]] = True
    return mask


def zeroed_and_cut(net, layers, mask):
    zeroed, cut = copy.deepcopy(net), copy.deepcopy(net)
    for layer in layers:
        for key, where in pruned_weights(layer, mask):
            zeroed.get_submodule(layer.name).get_parameter(key).data[where] = 0
    cut_channels(cut, {layer.name: layer.kept(mask) for layer in layers})
    return zeroed, cut


def macs(net, names):
    """MACs of these layers in one forward pass, from the shapes that go in and come out."""
    found = []

    def count(module, inputs, output):
        if isinstance(module, nn.Linear):
            found.append(inputs[0].numel() * output.shape[-1])
        else:
            window = math.prod(module.kernel_size)
            transposed = isinstance(module, nn.ConvTranspose2d)
            small, other = (inputs[0], output) if transposed else (output, inputs[0])
            found.append(small.numel() * window * other.shape[1] // module.groups)

    weighty = [net.get_submodule(name) for name in names]
    handles = [m.register_forward_hook(count) for m in weighty if m.weight.ndim > 1]
    forward(net)
    for handle in handles:
        handle.remove()
    return sum(found)


@torch.no_grad()
def assert_cut_is_zeroed(net, layers, groups, mask):
    zeroed, cut = zeroed_and_cut(net, layers, mask)
    for a, b in zip(forward(zeroed), forward(cut), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()) + 1e-30)
    names = [layer.name for layer in layers]
    left = sum(p.numel() for name in names for p in cut.get_submodule(name).parameters())
    assert coupled_cost(layers, groups).of(mask) == left
    positions = count_positions(net, lambda: forward(net))
    assert coupled_cost(layers, groups, positions).of(mask) == macs(cut, names)
    assert coupled_cost(layers, groups, positions).of(torch.ones(len(mask))) == macs(net, names)


@pytest.mark.parametrize('name', NETS)
def test_channels_are_tied_as_the_network_ties_them(name):
    make, expected, whole = NETS[name]
    torch.manual_seed(0)
    net = telling(make())
    if not expected:
        with pytest.raises(ValueError, match="block: 'channel' finds nothing to cut in Net: ") as e:
            find_channels(net, forward)
        assert all(reason in str(e.value) for reason in whole.values())
        return
    layers, groups, excluded = find_channels(net, forward)
    if isinstance(expected, str):
        expected, whole = [(expected, (expected, 'c'), 6)], {**whole, 'c': OUTPUT}
    assert [(group.name, group.layers, len(group.units)) for group in groups] == expected
    assert {item.name for item in excluded} == whole.keys()
    assert all(whole[item.name] in item.reason for item in excluded)
    units = [unit for group in groups for unit in group.units]
    assert units == list(range(len(units)))
    for seed in range(4):
        assert_cut_is_zeroed(net, layers, groups, random_mask(groups, seed))


@pytest.mark.parametrize('training', [True, False])
def test_finding_channels_leaves_the_model_as_it_was(training):
    net = telling(Net(chain, **three(d=frozen(conv(3, 3))))).train(training)
    net.b.eval()
    before = copy.deepcopy(net)
    net.a.weight.grad = torch.ones_like(net.a.weight)
    random = torch.get_rng_state()
    find_channels(net, forward)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert net.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.state_dict().items())
    for mine, old in zip(net.parameters(), before.parameters(), strict=True):
        assert mine.requires_grad == old.requires_grad
        assert mine is net.a.weight or mine.grad is None
    assert torch.equal(net.a.weight.grad, torch.ones_like(net.a.weight))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_weights_of_zero_hide_no_mistake():
    """A residual branch that starts at zero says nothing about what it is tied to."""
    net = telling(Net(around(shuffled), **three()))
    for parameter in net.parameters():
        parameter.data.zero_()
    _, groups, excluded = find_channels(net, forward)
    assert [group.name for group in groups] == ['b']
    assert [item.reason for item in excluded] == [CHANGED, OUTPUT]


def test_a_network_in_training_is_judged_by_its_evaluation():
    """Dropout, and statistics of one image of one pixel, would make any two runs differ."""
    net = Net(
        lambda n, x: n.c(n.norm(F.dropout(n.a(x), 0.5, n.training).mean((2, 3)))),
        a=conv(3, 8), norm=nn.BatchNorm1d(8), c=nn.Linear(8, 3),
    ).train()  # fmt: skip
    _, groups, _ = find_channels(net, forward)
    assert [group.layers for group in groups] == [('a', 'norm', 'c')]


def test_the_soft_mask_is_carried_where_no_norm_undoes_it():
    net = Net(
        lambda n, x: n.d(n.norm(n.a(x)).relu() + n.b(x) + n.c(x)),
        a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(3, 8), c=conv(3, 8), d=conv(8, 4),
    )  # fmt: skip
    layers, _, _ = find_channels(net, forward)
    assert {layer.name: layer.carries for layer in layers} == {
        'a': False, 'norm': True, 'b': True, 'c': True, 'd': False,
    }  # fmt: skip


# Rules


def test_layers_that_a_rule_excludes_stay_whole_and_so_does_what_is_tied_to_them():
    make, *_ = NETS['residual sum']
    _, groups, excluded = find_channels(make(), forward, [dict(pattern='c', exclude=True)])
    assert [group.name for group in groups] == ['b']
    assert {item.name: item.reason for item in excluded} == {
        'a': 'tied to c: excluded by a rule of `layers`',
        'c': 'excluded by a rule of `layers`',
        'd': OUTPUT,
    }


def test_the_last_rule_that_matches_counts():
    rules = [dict(pattern='*', exclude=True), dict(pattern='b', exclude=False)]
    _, groups, excluded = find_channels(Net(chain, **three()), forward, rules)
    assert [group.name for group in groups] == ['b']
    assert {item.name: item.reason for item in excluded} == {
        'a': 'excluded by a rule of `layers`',
        'c': OUTPUT,
    }


def test_a_rule_that_says_nothing_of_excluding_excludes_nothing_and_takes_nothing_back():
    rules = [dict(pattern='a', exclude=True), dict(pattern='*', min_density=0.5)]
    _, groups, excluded = find_channels(Net(chain, **three()), forward, rules)
    assert [group.name for group in groups] == ['b']
    assert ('a', 'excluded by a rule of `layers`') in [(x.name, x.reason) for x in excluded]


def test_no_rule_can_cut_the_outputs_of_the_model():
    _, _, excluded = find_channels(
        Net(chain, **three()), forward, [dict(pattern='c', exclude=False)]
    )
    assert ('c', OUTPUT) in [(item.name, item.reason) for item in excluded]


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        (dict(pattern='nothing', exclude=True), r"layers: the pattern 'nothing' matches no conv"),
        (dict(pattern='norm', exclude=True), r"layers: the pattern 'norm' matches no convolution"),
        (dict(pattern='a', block=(1, 1, 1, 1)), r"layers\[0\].block: can't be set beside"),
        (dict(name='a'), r'layers\[0\].*pattern'),
        (dict(pattern='*', exclude=True), 'finds nothing to cut in Net: excluded by a rule of'),
    ],
)
def test_a_wrong_rule_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        find_channels(Net(chain, **three()), forward, [rule])


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(ValueError, match='nothing to cut in Net: it has no convolution'):
        find_channels(Net(lambda n, x: x * n.scale, scale=nn.Parameter(torch.ones(1))), forward)


# Any network


class Wired(nn.Module):
    """A program: each step takes earlier maps, and its layer if it has one."""

    def __init__(self, steps, layers, ends):
        super().__init__()
        self.steps, self.ends, self.layers = steps, ends, nn.ModuleDict(layers)

    def forward(self, x):
        maps = [x]
        for kind, taken, name in self.steps:
            inputs = [maps[i] for i in taken]
            if kind == 'sum':
                maps.append(sum(inputs))
            elif kind == 'cat':
                maps.append(torch.cat(inputs, 1))
            elif kind == 'gate':
                gate = self.layers[name](inputs[0].mean((2, 3), keepdim=True))
                maps.append(inputs[0] * gate.sigmoid())
            else:
                maps.append(self.layers[name](inputs[0]))
        return [self.layers[name](maps[i]) for i, name in self.ends]


@st.composite
def networks(draw):
    """Convolutions of all kinds, norms, sums, concatenations and gates in any order."""
    widths, steps, layers = [3], [], {}

    def add(kind, taken, width, layer=None):
        name = f'{kind}{len(steps)}' if layer is not None else None
        if layer is not None:
            layers[name] = layer
        steps.append((kind, taken, name))
        widths.append(width)

    def followed(layer, width):
        norm = [nn.BatchNorm2d(width)] if draw(st.booleans()) else []
        act = draw(st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Identity]))()
        return nn.Sequential(layer, *norm, act)

    width = draw(st.sampled_from([2, 4, 6]))
    add('conv', [0], width, followed(conv(3, width), width))
    for _ in range(draw(st.integers(2, 7))):
        at = draw(st.integers(1, len(widths) - 1))
        inputs, kind = widths[at], draw(st.sampled_from(
            ['conv', 'depthwise', 'grouped', 'up', 'sum', 'branch', 'cat', 'gate']
        ))  # fmt: skip
        bias = draw(st.booleans())
        if kind == 'conv':
            width = draw(st.sampled_from([2, 3, 4, 6]))
            add(kind, [at], width, followed(conv(inputs, width, bias=bias), width))
        elif kind == 'up':
            layer = nn.ConvTranspose2d(inputs, 4, 3, padding=1, bias=bias)
            add(kind, [at], 4, followed(layer, 4))
        elif kind == 'depthwise':
            width = inputs * draw(st.integers(1, 2))
            layer = conv(inputs, width, groups=inputs, bias=bias)
            add(kind, [at], width, followed(layer, width))
        elif kind == 'grouped':
            groups = 2 if inputs % 2 == 0 else 1
            add(kind, [at], 4, followed(conv(inputs, 4, groups=groups, bias=bias), 4))
        elif kind == 'branch':  # a residual block
            add('conv', [at], inputs, followed(conv(inputs, inputs, bias=bias), inputs))
            add('sum', [at, len(widths) - 1], inputs)
        elif kind == 'sum':
            alike = [i for i in range(1, len(widths)) if widths[i] == inputs]
            add(kind, [at, draw(st.sampled_from(alike))], inputs)
        elif kind == 'cat':
            others = draw(st.lists(st.integers(1, len(widths) - 1), min_size=1, max_size=2))
            if inputs + sum(widths[i] for i in others) <= 24:
                taken = [at, *others]
                add(kind, taken, sum(widths[i] for i in taken))
        else:
            add(kind, [at], inputs, nn.Conv2d(inputs, inputs, 1))
    ends = []
    # What leads nowhere is in no graph, and would keep what feeds it whole.
    for i in set(range(1, len(widths))) - {i for _, taken, _ in steps for i in taken}:
        layers[f'end{i}'] = conv(widths[i], 2)
        ends.append((i, f'end{i}'))
    return Wired(steps, layers, ends)


# Without shrinking, which takes minutes: the networks are small enough to be read.
@settings(max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(networks(), st.integers(0, 2**16))
def test_any_network_is_cut_as_it_is_zeroed(net, seed):
    net = telling(net)
    try:
        layers, groups, excluded = find_channels(net, forward)
    except ValueError as error:  # groups of one layer can tie all channels into a single unit
        assert 'finds nothing to cut' in str(error) and CHANGED not in str(error)
        assume(False)
    assert_cut_is_zeroed(net, layers, groups, random_mask(groups, seed))
    assert_cut_is_zeroed(net, layers, groups, random_mask(groups, seed + 1))
    # The rules know all of these pieces: nothing is left whole to be on the safe side.
    assert CHANGED not in [item.reason for item in excluded]
