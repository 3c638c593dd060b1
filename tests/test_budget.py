"""Tests of mmsmart.budget: what blocks cost, and what may be kept."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.blocks import find_layers
from mmsmart.budget import budget_for, check_sparsity, make_budget, read_targets
from mmsmart.cost import block_cost, count_macs, count_positions

few = settings(max_examples=60)


# Budget


def test_blocks_cost_their_number_of_weights():
    layers, _ = find_layers(nn.Sequential(nn.Linear(10, 6), nn.Conv2d(2, 3, 3)), (4, 8, 1, 1))
    cost = block_cost(layers)
    assert cost.dtype == torch.float64
    assert cost.tolist() == [32, 8, 16, 4] + [6] * 9


@pytest.mark.parametrize(
    ('total', 'sparsity', 'budget'),
    [(1000, 0.8, 200), (1000, 0.9, 100), (10, 0.7, 3), (3, 0, 3), (7, 0.0, 7), (1000, 0.999, 1)],
)
def test_a_decimal_sparsity_of_a_round_total_gives_a_round_budget(total, sparsity, budget):
    assert budget_for(torch.ones(total, dtype=torch.float64), sparsity) == budget


@few
@given(st.integers(1, 10**12), st.integers(0, 9999))
def test_the_budget_is_exact_for_a_decimal_sparsity(total, points):
    """The nearest float to total * (1 - s), s read as the decimal that was written."""
    cost = torch.tensor([float(total)], dtype=torch.float64)
    exact = Fraction(total) * (1 - Fraction(points, 10000))
    assert budget_for(cost, float(f'{points / 10000:.4f}')) == float(exact)


@pytest.mark.parametrize('total', [100_000_001.0, 16_777_217.0, 0.1])
def test_a_total_that_float32_does_not_hold_is_not_rounded(total):
    for sparsity, kept in ((0.5, total / 2), (0.0, total)):
        (target,) = read_targets(sparsity, 'params')
        assert make_budget(target, None, total, 'weights').amount == kept


def test_a_sparsity_out_of_numpy_is_a_number():
    assert budget_for(torch.ones(1000), np.float64(0.8)) == 200


@pytest.mark.parametrize('sparsity', [1, 1.0, -0.1, 80, math.nan, math.inf, -math.inf])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError) as error:
        check_sparsity(sparsity)
    message = str(error.value)
    assert message.startswith(f'sparsity: {sparsity!r} is outside [0, 1)')
    assert '0.8 keeps one weight in five' in message


@pytest.mark.parametrize('sparsity', [True, False, '0.8', None, [0.8], {'backbone': 0.5}])
def test_a_sparsity_that_is_no_number_is_refused(sparsity):
    with pytest.raises(ValueError) as error:
        budget_for(torch.ones(4), sparsity)
    assert str(error.value) == f'sparsity: expected a number in [0, 1), got {sparsity!r}.'


# Positions and MACs


def macs_of(module, *shape):
    model = nn.Sequential(module)
    return count_macs(model, count_positions(model, lambda: model(torch.zeros(1, *shape))))


@pytest.mark.parametrize(
    ('module', 'shape', 'macs'),
    [
        # out * in / groups * kernel * positions of the output
        (nn.Conv2d(3, 4, 3), (3, 8, 8), 4 * 3 * 9 * 6 * 6),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 8), 4 * 3 * 9 * 5 * 4),
        (nn.Conv2d(6, 4, (3, 1), groups=2), (6, 8, 8), 4 * 3 * 3 * 6 * 8),
        (nn.Conv2d(4, 4, 3, dilation=2), (4, 8, 8), 4 * 4 * 9 * 4 * 4),
        (nn.Conv1d(2, 5, 4), (2, 10), 5 * 2 * 4 * 7),
        (nn.Conv3d(2, 5, 2), (2, 3, 4, 5), 5 * 2 * 8 * 2 * 3 * 4),
        # every position of the input meets every weight
        (nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 5, 6), 3 * 4 * 4 * 5 * 6),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 5, 6), 6 * 2 * 9 * 5 * 6),
        (nn.Linear(7, 5), (7,), 7 * 5),
        (nn.Linear(7, 5), (11, 7), 7 * 5 * 11),
    ],
)
def test_macs_equal_the_count_by_hand(module, shape, macs):
    assert macs_of(module, *shape) == macs


def test_macs_of_a_transposed_convolution_are_those_of_its_mirror_image():
    """The transposed layer does, forwards, the work of the convolution's backward pass."""
    x, y = (3, 8, 8), (4, 6, 6)
    assert macs_of(nn.Conv2d(3, 4, 3), *x) == macs_of(nn.ConvTranspose2d(4, 3, 3), *y)


def test_a_layer_used_twice_counts_twice():
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, nn.AvgPool2d(2), shared)
    positions = count_positions(model, lambda: model(torch.zeros(1, 3, 8, 8)))
    assert positions == {'0': 64 + 16}
    assert count_macs(model, positions) == 9 * 80


def test_two_layers_with_one_weight_count_as_the_first():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    run = lambda: model[2](model[1](model[1](torch.zeros(1, 8))))  # noqa: E731
    assert count_positions(model, run) == {'0': 2, '1': 0, '2': 1}
    assert count_macs(model, count_positions(model, run)) == 2 * 64 + 32


def test_a_layer_that_is_not_run_counts_nothing():
    model = nn.ModuleDict({'used': nn.Linear(3, 3), 'unused': nn.Linear(3, 3)})
    positions = count_positions(model, lambda: model['used'](torch.zeros(1, 3)))
    assert positions == {'used': 1, 'unused': 0}
    assert count_macs(model, positions) == 9


def test_layers_that_are_never_pruned_count_too():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    positions = count_positions(model, lambda: model(torch.zeros(1, 4, 5, 5)))
    assert count_macs(model, positions) == 4 * 9 * 9 + 32 * 9


def test_counting_leaves_no_hooks_even_if_the_forward_fails():
    model = nn.Sequential(nn.Linear(3, 3))
    count_positions(model, lambda: model(torch.zeros(1, 3)))
    with pytest.raises(RuntimeError, match='shapes'):
        count_positions(model, lambda: model(torch.zeros(1, 4)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings('ignore')  # MMEngine's own, at import and while it traces
def test_macs_of_resnet18_equal_mmengines_count():
    analysis = pytest.importorskip('mmengine.analysis')
    model = pytest.importorskip('torchvision').models.resnet18().eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        positions = count_positions(model, lambda: model(image))
        theirs = analysis.FlopAnalyzer(model, image).by_operator()
    assert count_macs(model, positions) == theirs['conv'] + theirs['linear']


class TestTargets:
    @pytest.mark.parametrize(
        ('sparsity', 'expected'),
        [
            (0.8, [('', 'macs', 0.8)]),
            (dict(params=0.6, macs=0.5), [('', 'params', 0.6), ('', 'macs', 0.5)]),
            (dict(backbone=0.8, neck=0), [('backbone', 'macs', 0.8), ('neck', 'macs', 0)]),
            (
                dict(backbone=dict(params=0.6, latency=0.2), head=0.1),
                [('backbone', 'params', 0.6), ('backbone', 'latency', 0.2), ('head', 'macs', 0.1)],
            ),
        ],
    )
    def test_sparsity_is_read_by_resource_and_part(self, sparsity, expected):
        found = read_targets(sparsity, 'macs')
        assert [(x.part, x.resource, x.sparsity) for x in found] == expected

    @pytest.mark.parametrize(
        ('sparsity', 'parts'),
        [
            (1.0, ['sparsity: 1.0 is outside [0, 1)']),
            ({}, ['got []']),
            (dict(params=0.5, backbone=0.5), ["['params', 'backbone']", 'backbone=dict(']),
            (dict(backbone=1.5), ['1.5 is outside', "sparsity['backbone']"]),
            (dict(macs='half'), ["'half'", "sparsity['macs']"]),
            (dict(backbone={}), ["'backbone': {}"]),
            (dict(backbone=dict(flops=0.5)), ["unknown key 'flops'", 'latency']),
            ({3: 0.5}, ['got 3: 0.5']),
        ],
    )
    def test_a_wrong_sparsity_is_refused_by_name(self, sparsity, parts):
        with pytest.raises(ValueError) as error:
            read_targets(sparsity)
        assert str(error.value).startswith('sparsity')
        assert all(part in str(error.value) for part in parts), str(error.value)

    def test_an_unknown_resource_is_refused(self):
        with pytest.raises(ValueError, match=r"resource: got 'flops', allowed are \('params'"):
            read_targets(0.5, 'flops')
