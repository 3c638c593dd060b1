"""Tests of mmsmart.functional.blocks."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsmart.functional import (
    block_dot,
    block_expand,
    block_grid,
    block_reduce,
    block_scale,
    block_sizes,
    blocks,
)


@st.composite
def shapes_and_blocks(draw):
    axes = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(1, 7)) for _ in range(axes))
    block = tuple(draw(st.sampled_from([-1, 1, 2, 3, 5, 9])) for _ in range(axes))
    return shape, block


def numbers(shape):
    """Whole numbers in float64: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-99, 100, shape, generator=generator).double()


def sums_by_loop(x, block):
    """Add each block up entry by entry: the definition, slow."""
    lengths = [axis if length == -1 else length for axis, length in zip(x.shape, block)]
    total = torch.zeros(block_grid(x.shape, block), dtype=x.dtype)
    for index in itertools.product(*(range(axis) for axis in x.shape)):
        total[tuple(i // length for i, length in zip(index, lengths))] += x[index]
    return total


@given(shapes_and_blocks())
def test_reduce_equals_sum_by_loop(case):
    shape, block = case
    x = numbers(shape)
    assert torch.equal(block_reduce(x, block), sums_by_loop(x, block))


@given(shapes_and_blocks())
def test_reduce_of_ones_is_block_sizes(case):
    shape, block = case
    sizes = block_sizes(shape, block)
    assert sizes.dtype == torch.int64
    assert torch.equal(block_reduce(torch.ones(shape), block), sizes.float())


@given(shapes_and_blocks())
def test_expand_then_reduce_multiplies_by_sizes(case):
    shape, block = case
    values = numbers(block_grid(shape, block))
    back = block_reduce(block_expand(values, shape, block), block)
    assert torch.equal(back, values * block_sizes(shape, block))


@given(shapes_and_blocks())
def test_reduce_preserves_the_sum(case):
    shape, block = case
    x = numbers(shape)
    assert block_reduce(x, block).sum() == x.sum()


@given(shapes_and_blocks())
def test_every_entry_gets_the_value_of_its_block(case):
    shape, block = case
    values = torch.arange(block_sizes(shape, block).numel()).view(block_grid(shape, block))
    full = block_expand(values, shape, block)
    lengths = [axis if length == -1 else length for axis, length in zip(shape, block)]
    assert full.shape == shape
    for index in itertools.product(*(range(axis) for axis in shape)):
        assert full[index] == values[tuple(i // n for i, n in zip(index, lengths))]


@given(shapes_and_blocks())
def test_results_share_no_memory_with_arguments(case):
    shape, block = case
    x, values = torch.zeros(shape), torch.zeros(block_grid(shape, block))
    block_reduce(x, block).fill_(1)
    block_expand(values, shape, block).fill_(1)
    assert not x.any()
    assert not values.any()


@given(shapes_and_blocks(), st.sampled_from([1, 2, 7, 1 << 18]))
def test_scaling_multiplies_every_entry_by_the_value_of_its_block(case, piece):
    shape, block = case
    x, values = numbers(shape), numbers(block_grid(shape, block)) + 0.5
    expected = x * block_expand(values, shape, block)
    with mock.patch.object(blocks, '_PIECE', piece):
        assert torch.equal(block_scale(x, values, block), expected)
        assert block_scale(x, values, block, out=x) is x
    assert torch.equal(x, expected)


@given(shapes_and_blocks(), st.sampled_from([1, 2, 7, 1 << 18]))
def test_dot_sums_products_over_every_block(case, piece):
    shape, block = case
    x = numbers(shape)
    y = x.flip(0) + 1 if shape else x + 1
    with mock.patch.object(blocks, '_PIECE', piece):
        assert torch.equal(block_dot(x, y, block), block_reduce(x * y, block))


@pytest.mark.parametrize('block', [(4, 2, 1, -1), (3, 3, 2, 2), (1, 1, 1, 1)])
def test_products_take_any_memory_layout(block):
    x = numbers((8, 4, 3, 3))
    y, values = x + 1, numbers(block_grid(x.shape, block))
    last, other = (z.to(memory_format=torch.channels_last) for z in (x, y))
    assert torch.equal(block_dot(last, other, block), block_dot(x, y, block))
    scaled = block_scale(last, values, block)
    assert torch.equal(scaled, block_scale(x, values, block))
    assert scaled.stride() == last.stride()


def test_expand_is_contiguous_so_that_views_of_it_work():
    assert block_expand(torch.rand(2, 2), (5, 3), (3, 2)).is_contiguous()
    assert block_expand(torch.rand(2, 2), (6, 4), (3, 2)).is_contiguous()


def test_reduce_takes_any_memory_layout():
    x = numbers((8, 4, 3, 3)).to(memory_format=torch.channels_last)
    assert torch.equal(block_reduce(x, (4, 2, 1, -1)), sums_by_loop(x, (4, 2, 1, -1)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_dtype_is_kept(dtype):
    x = torch.ones(5, 4).to(dtype)
    assert block_reduce(x, (2, -1)).dtype == dtype
    assert block_expand(x, (10, 8), (2, 2)).dtype == dtype


@pytest.mark.parametrize(('shape', 'block'), [((6, 4), (3, 2)), ((7, 5), (3, 2)), ((4,), (-1,))])
def test_gradient_of_one_is_the_other(shape, block):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = torch.randn(block_grid(shape, block), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_reduce(x, block), x)
    assert torch.autograd.gradcheck(lambda v: block_expand(v, shape, block), values)


def test_grid_of_a_convolution():
    assert block_grid((64, 3, 7, 7), (16, 8, 1, 1)) == (4, 1, 7, 7)
    assert block_grid((64, 3, 7, 7), (1, -1, -1, -1)) == (64, 1, 1, 1)


@pytest.mark.parametrize(
    ('shape', 'block', 'message'),
    [
        ((4, 4), (2,), r'(?s)one entry an axis.*block: \(2,\).*shape: \(4, 4\)'),
        ((4, 4), (2, 0), r'block is \(2, 0\); each entry must be >= 1, or -1'),
        ((4, 4), (-2, 1), r'block is \(-2, 1\)'),
        ((0, 4), (1, 1), r'shape is \(0, 4\); each axis needs at least one entry'),
    ],
)
def test_bad_block_is_refused_by_every_function(shape, block, message):
    with pytest.raises(ValueError, match=message):
        block_grid(shape, block)
    with pytest.raises(ValueError, match=message):
        block_sizes(shape, block)
    with pytest.raises(ValueError, match=message):
        block_reduce(torch.zeros(shape), block)
    with pytest.raises(ValueError, match=message):
        block_expand(torch.zeros(1), shape, block)
    with pytest.raises(ValueError, match=message):
        block_scale(torch.zeros(shape), torch.zeros(1), block)
    with pytest.raises(ValueError, match=message):
        block_dot(torch.zeros(shape), torch.zeros(shape), block)


def test_values_off_the_grid_are_refused():
    with pytest.raises(ValueError, match=r'(?s)one entry a block.*values: \(2, 3\).*\(2, 2\)'):
        block_expand(torch.zeros(2, 3), (4, 4), (2, 2))
    with pytest.raises(ValueError, match=r'(?s)one entry a block.*values: \(4,\).*\(2, 2\)'):
        block_scale(torch.zeros(4, 4), torch.zeros(4), (2, 2))
