"""Sums over blocks of a tensor, their reverse, and products with either.

A block is a box of entries, given by its length along each axis; -1 stands for the whole axis, and
a length above the axis is cut to it. Blocks start at index 0 of each axis; where the length does
not divide the axis, the last block is shorter (a ragged edge).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

# Entries handled at a time on a CPU by each of its threads: what is computed on the way stays in
# the cache, and is small enough that the allocator keeps its memory.
_PIECE = 1 << 18


def block_grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Count the blocks along each axis.

    Args:
        shape: length of each axis, each >= 1.
        block: length of the block along each axis, >= 1, or -1 for the whole axis.

    Returns:
        ceil(axis / block) for each axis.

    Raises:
        ValueError: block has another number of entries than shape, or an entry is 0 or below -1,
            or an axis is empty.

    Example:
        >>> block_grid((20, 16, 3, 3), (16, 8, 1, -1))
        (2, 2, 3, 1)
    """
    lengths = _lengths(shape, block)
    return tuple(-(-axis // length) for axis, length in zip(shape, lengths))


def block_reduce(x: Tensor, block: Sequence[int]) -> Tensor:
    """Sum x over each block.

    Args:
        x: any shape, floating point or int64.
        block: as for `block_grid`, one entry an axis.

    Returns:
        Sums, shape ``block_grid(x.shape, block)``; dtype of x.

    Raises:
        ValueError: as `block_grid`.

    Example:
        >>> block_reduce(torch.arange(6).view(2, 3), (2, 2))
        tensor([[8, 7]])
    """
    lengths = _lengths(x.shape, block)
    whole = [axis for axis, length in enumerate(lengths) if length == x.shape[axis]]
    # Outer axes first, which adds long rows to each other; whole axes last, in one sum over what
    # is left. On a convolution this is up to five times faster than one sum over all axes.
    for axis, length in enumerate(lengths):
        if axis not in whole and length > 1:
            x = _reduce_axis(x, axis, length)
    # Without a whole axis this would be a sum over all of them, and x may be what was given.
    return x.sum(whole, keepdim=True) if whole else x.clone()


def block_expand(values: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Give every entry of a tensor of this shape the value of its block.

    Args:
        values: one value a block, shape ``block_grid(shape, block)``.
        shape: of the result.
        block: as for `block_grid`.

    Returns:
        A new tensor of the given shape, dtype of values.

    Raises:
        ValueError: as `block_grid`, or values has another shape than the grid.

    Example:
        >>> block_expand(torch.tensor([[1, 2]]), (2, 3), (2, 2))
        tensor([[1, 1, 2],
                [1, 1, 2]])
    """
    shape = tuple(shape)
    grid = block_grid(shape, block)
    lengths = _lengths(shape, block)
    _check_values(values, shape, block)
    if not shape:
        return values.clone()
    padded = [count * length for count, length in zip(grid, lengths)]
    pairs = [size for pair in zip(grid, lengths) for size in pair]
    spread = values.view_as(values)
    for axis in range(len(shape)):
        spread = spread.unsqueeze(2 * axis + 1)
    whole = spread.expand(pairs).clone(memory_format=torch.contiguous_format).view(padded)
    if tuple(padded) == shape:
        return whole
    return whole[tuple(slice(axis) for axis in shape)].contiguous()


def block_scale(
    x: Tensor, values: Tensor, block: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """Multiply every block of x by its value: ``x * block_expand(values, x.shape, block)``.

    The values are broadcast over a view of x in blocks, so nothing of the size of x is made beside
    the result.

    Args:
        x: any shape, floating point.
        values: one value a block, shape ``block_grid(x.shape, block)``.
        block: as for `block_grid`.
        out: takes the result, shape of x; x itself is allowed. None makes a new tensor.

    Returns:
        out.

    Raises:
        ValueError: as `block_expand`.

    Example:
        >>> block_scale(torch.ones(2, 3), torch.tensor([[2.0, 3.0]]), (2, 2))
        tensor([[2., 2., 3.],
                [2., 2., 3.]])
    """
    _check_values(values, x.shape, block)
    out = torch.empty_like(x) if out is None else out
    for entries, blocks, pairs in _pieces(x, block):
        factor = values[blocks].reshape([n for count in pairs[::2] for n in (count, 1)])
        if pairs and pairs[1] > 1:
            # One row spread out for all rows of a block, so that long rows are multiplied.
            factor = factor.expand([pairs[0], 1, *pairs[2:]]).contiguous()
        torch.mul(x[entries].view(pairs), factor, out=out[entries].view(pairs))
    return out


def block_dot(x: Tensor, y: Tensor, block: Sequence[int], out: Tensor | None = None) -> Tensor:
    """Sum the products of x and y over each block: ``block_reduce(x * y, block)``.

    The products are summed while they are in the cache; on a CPU each of x and y is read once.

    Args:
        x: any shape, floating point.
        y: shape and dtype of x.
        block: as for `block_grid`.
        out: takes the sums, shape ``block_grid(x.shape, block)``. None makes a new tensor of x's
            dtype.

    Returns:
        out.

    Raises:
        ValueError: as `block_grid`, or out has another shape than the grid.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> block_dot(x, x, (1, 2))
        tensor([[5., 9.]])
    """
    out = x.new_empty(block_grid(x.shape, block)) if out is None else out
    _check_values(out, x.shape, block)
    for entries, blocks, pairs in _pieces(x, block):
        products = x[entries].view(pairs) * y[entries].view(pairs)
        # As in `block_reduce`, outer axes first.
        for axis in range(1, len(pairs), 2):
            if pairs[axis] > 1:
                products = products.sum(axis, keepdim=True)
        out[blocks] = products.view(pairs[::2])
    return out


def block_sizes(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Count the entries of each block; those at a ragged edge have fewer.

    Returns:
        int64, shape ``block_grid(shape, block)``.

    Raises:
        ValueError: as `block_grid`.

    Example:
        >>> block_sizes((2, 3), (2, 2))
        tensor([[4, 2]])
    """
    grid = block_grid(shape, block)
    sizes = torch.ones(grid, dtype=torch.int64)
    for axis, (length, count) in enumerate(zip(_lengths(shape, block), grid)):
        along = torch.full((count,), length, dtype=torch.int64)
        along[-1] = shape[axis] - (count - 1) * length
        sizes *= along.view([-1 if other == axis else 1 for other in range(len(grid))])
    return sizes


def _lengths(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return the block's length along each axis, -1 and overlong entries replaced by the axis."""
    shape, block = tuple(shape), tuple(block)
    if len(block) != len(shape):
        raise ValueError(
            f'block must have one entry an axis:\n'
            f'  block: {block}\n'
            f'  shape: {shape}\n'
            f'Write -1 for an axis that a block spans whole'
        )
    if any(length == 0 or length < -1 for length in block):
        raise ValueError(f'block is {block}; each entry must be >= 1, or -1 for the whole axis')
    if any(axis < 1 for axis in shape):
        raise ValueError(f'shape is {shape}; each axis needs at least one entry')
    return tuple(axis if length == -1 else min(length, axis) for axis, length in zip(shape, block))


def _check_values(values: Tensor, shape: Sequence[int], block: Sequence[int]) -> None:
    grid = block_grid(shape, block)
    if tuple(values.shape) != grid:
        raise ValueError(
            f'values must have one entry a block:\n'
            f'  values: {tuple(values.shape)}\n'
            f'  grid:   {grid}, of shape {tuple(shape)} in blocks of {tuple(block)}'
        )


def _pieces(
    x: Tensor, block: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], list[int]]]:
    """Cut x between its blocks into pieces that fit the cache, each with blocks of one size.

    Yields:
        Where the entries of a piece are, where its blocks are, and the shape that shows the entries
        by block: how many blocks, and how long, along each axis in turn.
    """
    lengths = _lengths(x.shape, block)
    counts = [size // length for size, length in zip(x.shape, lengths)]
    most = _PIECE * torch.get_num_threads() if x.device.type == 'cpu' else x.numel()
    longest = max(range(x.ndim), key=counts.__getitem__, default=None)
    cuts = []
    for axis, (size, length, count) in enumerate(zip(x.shape, lengths, counts)):
        step = max(1, count * most // x.numel()) if axis == longest else count
        if step >= count and count * length == size:
            cuts.append([(slice(None), slice(None), count, length)])
            continue
        along = []
        for begin in range(0, count, step):
            end = min(begin + step, count)
            entries = slice(begin * length, end * length)
            along.append((entries, slice(begin, end), end - begin, length))
        if count * length < size:  # the shorter last block
            edge = size - count * length
            along.append((slice(count * length, size), slice(count, count + 1), 1, edge))
        cuts.append(along)
    for piece in product(*cuts):
        pairs = [n for *_, count, length in piece for n in (count, length)]
        yield tuple(cut[0] for cut in piece), tuple(cut[1] for cut in piece), pairs


def _reduce_axis(x: Tensor, axis: int, length: int) -> Tensor:
    """Sum over blocks along one axis: the part that divides, then the shorter last block."""
    size = x.shape[axis]
    even = size - size % length
    main = x.narrow(axis, 0, even).unflatten(axis, (-1, length)).sum(axis + 1)
    if even == size:
        return main
    edge = x.narrow(axis, even, size - even).sum(axis, keepdim=True)
    return torch.cat([main, edge], axis)
