"""How the blocks of one weight lie in a packed-blocks file: which are there, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsmart.functional import block_grid

_MAX_INDEX = 2**31 - 1
# Weights are moved as integers of their size: NaN, infinity and -0.0 keep their bits.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Cut:
    """How a weight is cut, always with the groups as first axis: a 1 there moves no block."""

    shape: tuple[int, ...]
    block: tuple[int, ...]
    groups: int

    @property
    def view_shape(self) -> tuple[int, ...]:
        return (self.groups, self.shape[0] // self.groups, *self.shape[1:])

    @property
    def grid(self) -> tuple[int, ...]:
        return block_grid(self.view_shape, (1, *self.block))

    @property
    def volume(self) -> int:
        """Number of entries where ragged blocks count as whole ones."""
        return math.prod(self.grid) * math.prod(self.block)

    def as_json(self) -> dict[str, Any]:
        return {'shape': self.shape, 'block': self.block, 'groups': self.groups}

    def split(self, values: Tensor) -> Tensor:
        """Every block as a row, `(num_blocks, block entries)`; ragged ones filled with zeros."""
        lengths = (1, *self.block)
        whole = values.new_zeros([count * length for count, length in zip(self.grid, lengths)])
        whole[self._corner] = values.reshape(self.view_shape)
        pairs = [size for pair in zip(self.grid, lengths) for size in pair]
        axes = range(len(pairs))
        blocks = whole.reshape(pairs).permute(*axes[::2], *axes[1::2])
        return blocks.reshape(-1, math.prod(self.block))

    def join(self, rows: Tensor) -> Tensor:
        """Reverse of :meth:`split`, in the weight's own shape."""
        lengths = (1, *self.block)
        order = [axis for i in range(len(lengths)) for axis in (i, i + len(lengths))]
        whole = [count * length for count, length in zip(self.grid, lengths)]
        blocks = rows.reshape(*self.grid, *lengths).permute(order).reshape(whole)
        return blocks[self._corner].reshape(self.shape)

    def inside(self) -> Tensor:
        """Which entries of :meth:`split` are weights and not filling, bool."""
        return self.split(torch.ones(self.shape, dtype=torch.bool))

    @property
    def _corner(self) -> tuple[slice, ...]:
        return tuple(slice(length) for length in self.view_shape)


def pack(weight: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """The blocks that are not zero, one after the other, and their indices."""
    rows = cut.split(weight.view(BITS[weight.element_size()]))
    kept = (rows != 0).any(1)
    blocks = rows[kept][cut.inside()[kept]]
    return blocks.view(weight.dtype), kept.nonzero().flatten().to(torch.int32)


def unpack(path: str | Path, key: str, blocks: Tensor, index: Tensor, cut: Cut) -> Tensor:
    """Reverse of :func:`pack`, for tensors that come from a file."""
    where, count = f'{path}: {key}.index', math.prod(cut.grid)
    if index.dtype != torch.int32:
        raise ValueError(f'{where}: expected dtype torch.int32, got {index.dtype}.')
    index = index.long()
    if bool((index.diff() <= 0).any()):
        raise ValueError(f'{where}: expected ascending indices without repetition.')
    if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < count:
        first, last = int(index[0]), int(index[-1])
        raise ValueError(f'{where}: expected indices in [0, {count}), got {first} to {last}.')
    inside = cut.inside()[index]
    if len(blocks) != int(inside.sum()):
        raise ValueError(
            f'{path}: {key}.blocks: the {len(index)} blocks of the index hold {int(inside.sum())} '
            f'weights, got {len(blocks)}.'
        )
    bits = blocks.view(BITS[blocks.element_size()])
    kept = bits.new_zeros(inside.shape)
    kept[inside] = bits
    rows = bits.new_zeros(count, inside.shape[1])
    rows[index] = kept
    return cut.join(rows).contiguous().view(blocks.dtype)


def checked_cut(where: str, row: Any) -> Cut:
    if not isinstance(row, Mapping):
        raise ValueError(f'{where}: expected shape, block and groups, got {row!r:.80}.')
    shape, block = (_checked_sizes(f'{where}.{key}', row.get(key)) for key in ('shape', 'block'))
    groups = row.get('groups')
    if type(groups) is not int or groups < 1 or shape[0] % groups:
        raise ValueError(f'{where}.groups: expected a divisor of {shape[0]}, got {groups!r:.80}.')
    cut = Cut(shape, block, groups)
    largest = cut.view_shape[1:]
    if len(block) != len(shape) or any(b > axis for b, axis in zip(block, largest)):
        raise ValueError(f'{where}.block: expected at most {largest}, got {block}.')
    if math.prod(cut.grid) > _MAX_INDEX:
        raise ValueError(f'{where}.block: {block} makes more blocks than an int32 can number.')
    return cut


def _checked_sizes(where: str, sizes: Any) -> tuple[int, ...]:
    sizes = tuple(sizes) if isinstance(sizes, (list, tuple)) else sizes
    fits = isinstance(sizes, tuple) and 2 <= len(sizes) <= 5
    if not fits or not all(type(size) is int and 1 <= size <= _MAX_INDEX for size in sizes):
        raise ValueError(f'{where}: expected 2 to 5 integers of at least 1, got {sizes!r:.200}.')
    return sizes
