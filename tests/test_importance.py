"""Tests of mmsmart.importance: what is known of a block before the search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.blocks import find_layers
from mmsmart.importance import (
    activation,
    common_scale,
    contributions,
    gradient,
    input_norms,
    magnitude,
)

few = settings(max_examples=40)


def standardised(*layers):
    """Each layer's scores over their mean, then mean 0 and deviation 1: by hand, in float64."""
    flat = torch.cat([torch.tensor(s).double() / torch.tensor(s).double().mean() for s in layers])
    return ((flat - flat.mean()) / flat.std(unbiased=False)).float()


def one_layer(module, block):
    layers, _ = find_layers(nn.ModuleDict({'layer': module}), block)
    return layers


def with_weight(module, weight):
    module.weight.data = torch.tensor(weight, dtype=torch.float32).reshape(module.weight.shape)
    return module


# Magnitude


def test_magnitude_is_the_mean_absolute_weight_of_a_block():
    weight = [[1, -1, 4], [1, 1, 0], [2, 6, -5]]
    layers = one_layer(with_weight(nn.Linear(3, 3), weight), (2, 2))
    # Blocks: 2x2, 2x1 (edge), 1x2 (edge), 1x1 (corner).
    torch.testing.assert_close(magnitude(layers), standardised([1, 2, 4, 5]))


def test_layers_are_made_comparable_before_the_network_is_standardised():
    model = nn.Sequential(
        with_weight(nn.Linear(2, 1), [[1, 3]]), with_weight(nn.Linear(2, 1), [[100, 700]])
    )
    layers, _ = find_layers(model, (1, 1))
    torch.testing.assert_close(magnitude(layers), standardised([0.5, 1.5], [0.25, 1.75]))


@pytest.mark.parametrize('factor', [1e-6, 1000.0, 1e12])
def test_importance_does_not_depend_on_the_scale_of_a_layer(factor):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1))
    layers, _ = find_layers(model, (2, 2, 1, 1))
    before = magnitude(layers)
    model[0].weight.data.mul_(factor)
    torch.testing.assert_close(magnitude(layers), before, rtol=1e-4, atol=1e-5)


def test_importance_is_standardised_over_the_network():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 40))
    layers, _ = find_layers(model, (2, 2, 1, 1))
    importance = magnitude(layers)
    assert importance.dtype == torch.float32
    assert importance.shape == (4 * 2 * 9 + 20 * 4,)
    assert abs(importance.mean().item()) < 1e-6
    assert abs(importance.std(unbiased=False).item() - 1) < 1e-5
    assert not importance.requires_grad


@few
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.floats(1e-6, 1e6)),
        min_size=1,
        max_size=4,
    )
)
def test_equal_weights_in_every_layer_give_zeros(sizes):
    """Rounding of the sums and means must not be blown up to unit deviation."""
    model = nn.Sequential(nn.Linear(8, 8), *[nn.Linear(*size) for *size, _ in sizes])
    for layer, value in zip(model, [1.0, *[value for *_, value in sizes]]):
        nn.init.constant_(layer.weight, value)
    layers, _ = find_layers(model, (3, 7))
    importance = magnitude(layers)
    assert torch.equal(importance, torch.zeros_like(importance))


def test_a_layer_of_zeros_does_not_spoil_the_others():
    importance = common_scale([torch.zeros(3), torch.tensor([1.0, 3.0])])
    torch.testing.assert_close(importance, standardised_with_zeros())
    assert importance[:3].unique().numel() == 1


def standardised_with_zeros():
    flat = torch.tensor([0, 0, 0, 0.5, 1.5])
    return (flat - flat.mean()) / flat.std(unbiased=False)


# Activation


def activation_of(module, block, *inputs):
    layers = one_layer(module, block)
    with torch.no_grad(), input_norms(layers) as norms:
        for x in inputs:
            module(x)
    return activation(layers, norms)


def rms_channels(*rms):
    """An image whose channels have these root mean squares, with both signs in it."""
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 1, 2, 2)
    return torch.tensor(rms).view(1, -1, 1, 1) * sign


def test_activation_weighs_a_linear_layer_by_its_input_channels():
    layer = with_weight(nn.Linear(2, 2), [[1, -1], [2, 3]])
    x = torch.tensor([[[3.0, 10.0], [-4.0, 0.0]], [[5.0, 10.0], [0.0, 0.0]]])  # images of tokens
    rms = [(50 / 4) ** 0.5, (200 / 4) ** 0.5]
    expected = standardised([rms[0], rms[1], 2 * rms[0], 3 * rms[1]])
    torch.testing.assert_close(activation_of(layer, (1, 1), x), expected)


def test_activation_weighs_a_convolution_by_its_input_channels():
    layer = with_weight(nn.Conv2d(2, 2, 1), [[1, -1], [2, 3]])
    expected = standardised([2.0, 5.0, 4.0, 15.0])
    torch.testing.assert_close(activation_of(layer, (1, 1, 1, 1), rms_channels(2, 5)), expected)


def test_activation_averages_over_the_block():
    layer = with_weight(nn.Conv2d(2, 2, 1), [[1, -1], [2, 3]])
    expected = standardised([(2 + 5) / 2, (4 + 15) / 2])
    torch.testing.assert_close(activation_of(layer, (1, 2, 1, 1), rms_channels(2, 5)), expected)


def test_activation_weighs_each_group_by_its_own_channels():
    layer = with_weight(nn.Conv2d(4, 2, 1, groups=2), [[1, 1], [1, 3]])
    expected = standardised([2.0, 5.0, 7.0, 3 * 11.0])
    found = activation_of(layer, (1, 1, 1, 1), rms_channels(2, 5, 7, 11))
    torch.testing.assert_close(found, expected)


def test_activation_weighs_a_transposed_convolution_by_the_rows_of_its_weight():
    layer = with_weight(nn.ConvTranspose2d(2, 3, 1), [[1, 2, 3], [4, 5, 6]])
    expected = standardised([2.0, 4, 6, 20, 25, 30])
    torch.testing.assert_close(activation_of(layer, (1, 1, 1, 1), rms_channels(2, 5)), expected)


def test_activation_weighs_each_group_of_a_transposed_convolution():
    layer = with_weight(nn.ConvTranspose2d(4, 2, 1, groups=2), [1, 2, 3, 4])
    expected = standardised([2.0, 10, 21, 44])
    found = activation_of(layer, (1, 1, 1, 1), rms_channels(2, 5, 7, 11))
    torch.testing.assert_close(found, expected)


def test_norms_are_root_mean_squares_over_all_passes():
    """Passes of different sizes count by their positions."""
    layer = nn.Conv1d(1, 1, 1)
    layers = one_layer(layer, (1, 1))
    with torch.no_grad(), input_norms(layers) as norms:
        layer(torch.full((1, 1, 3), 2.0))
        layer(torch.full((2, 1, 4), -1.0))
    torch.testing.assert_close(norms['layer'], torch.tensor([((3 * 4 + 8) / 11) ** 0.5]))


def test_norms_of_an_image_without_batch_axis_are_by_channel_too():
    layers = one_layer(layer := nn.Conv2d(2, 2, 1), (1, 1, 1, 1))
    with torch.no_grad(), input_norms(layers) as norms:
        layer(rms_channels(2, 5)[0])
    torch.testing.assert_close(norms['layer'], torch.tensor([2.0, 5.0]))


def test_a_layer_that_was_not_called_falls_back_to_its_magnitude():
    """Attention uses the weight of its output projection without calling the layer."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layers = one_layer(attention, (2, 2))
    x = torch.randn(1, 3, 8)
    with torch.no_grad(), input_norms(layers) as norms:
        attention(x, x, x)
    assert norms == {}
    assert torch.equal(activation(layers, norms), magnitude(layers))


def test_recording_leaves_no_hooks_even_if_the_forward_fails():
    layer = nn.Linear(3, 3)
    layers = one_layer(layer, (1, 1))
    with pytest.raises(RuntimeError, match='shapes'), input_norms(layers):
        layer(torch.zeros(1, 4))
    with input_norms(layers):
        layer(torch.zeros(1, 3))
    assert not layer._forward_pre_hooks


def test_recording_changes_neither_weights_nor_gradients():
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    with input_norms(one_layer(layer, (1, 1))) as norms:
        layer(torch.randn(2, 3)).sum().backward()
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is not None
    assert not norms['layer'].requires_grad


def test_contributions_are_the_change_of_the_loss_as_blocks_grow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    images = torch.randn(5, 4).double()
    layers, _ = find_layers(model, block=(2, 2))
    model(images).square().mean().backward()
    expected = []
    for layer in layers:
        for block in torch.eye(layer.num_blocks).double():
            ends, kept = [], layer.weight.data.clone()
            for step in (1e-5, -1e-5):
                layer.weight.data = kept * (1 + step * layer.expand(block))
                ends.append(model(images).square().mean().item())
            layer.weight.data = kept
            expected.append((ends[0] - ends[1]) / 2e-5)
    torch.testing.assert_close(contributions(layers), torch.tensor(expected).double())


def test_layers_without_a_gradient_contribute_nothing_and_score_least():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers, _ = find_layers(model, block=(2, 2))
    model[0](torch.ones(1, 4)).sum().backward()
    squares = contributions(layers).square()
    assert bool((squares[4:] == 0).all())
    scores = gradient(squares)
    assert bool(scores.isfinite().all()) and scores[:4].min() > scores[4:].max()
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
