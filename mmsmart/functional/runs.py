"""One number a block, of which equal neighbours are held once.

Blocks of a layer have one size but for ragged edges, so the sizes and costs of all blocks of a
network are a few numbers and how often each comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Numbers written out at a time where all of them are read.
_PART = 1 << 20


@dataclass(frozen=True, eq=False)
class Runs:
    """A vector of float64 by runs of equal numbers, read in slices as a tensor is.

    Args:
        values: The number of each run, float64 `(runs,)`.
        ends: Where each run ends, int64 `(runs,)`, always on the CPU, where it is looked up without
            waiting for a GPU; None if every number is a run of its own.

    Example:
        >>> sizes = Runs.of(torch.tensor([4.0, 4.0, 4.0, 4.0, 4.0, 2.0]))
        >>> sizes.values.tolist(), sizes.ends.tolist(), sizes[3:].tolist(), float(sizes.sum())
        ([4.0, 2.0], [5, 6], [4.0, 4.0, 2.0], 22.0)
    """

    values: Tensor
    ends: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor | Runs) -> Runs:
        """The runs of a vector `(num_blocks,)`; its numbers as they are where runs take more."""
        if isinstance(x, Runs):
            return x
        x = x.detach().double()
        values, lengths = torch.unique_consecutive(x, return_counts=True)
        if 2 * len(values) > len(x):
            return cls(x)
        # What was found lies in memory as long as the vector was.
        return cls(values.clone(), lengths.cumsum(0).cpu())

    def __len__(self) -> int:
        return len(self.values) if self.ends is None else int(self.ends[-1])

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self)])

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        """What a tensor would give; for all but a slice without a step it is written out whole."""
        if self.ends is None:
            return self.values[key]
        if not isinstance(key, slice) or key.step not in (None, 1):
            return self.dense()[key]
        begin, end, _ = key.indices(len(self))
        part = self.narrow(begin, end - begin)
        if len(part.values) == 1:  # the usual one, and four times as fast
            return part.values.expand(end - begin).contiguous()
        lengths = part.ends.diff(prepend=part.ends.new_zeros(1))
        lengths = lengths.to(self.device, non_blocking=True)
        return part.values.repeat_interleave(lengths, output_size=end - begin)

    def split(self, length: int) -> list[Tensor]:
        """The numbers in parts of this length, to be read only: equal parts share their memory."""
        if self.ends is None:
            return list(self.values.split(length))
        parts: list[Tensor] = []
        of_run: dict[int, Tensor] = {}
        for begin in range(0, len(self), length):
            count = min(length, len(self) - begin)
            first, last = self._runs_of(begin, count)
            if first != last:
                parts.append(self[begin : begin + count])
                continue
            if first not in of_run:
                of_run[first] = self[begin : begin + count]
            parts.append(of_run[first][:count])
        return parts

    def narrow(self, begin: int, count: int) -> Runs:
        """The vector of `count` numbers, 1 or more, from one of them on."""
        if self.ends is None:
            return Runs(self.values.narrow(0, begin, count))
        first, last = self._runs_of(begin, count)
        runs = slice(first, last + 1)
        return Runs(self.values[runs], self.ends[runs].clamp_max(begin + count) - begin)

    def sum(self) -> Tensor:
        """Sum of all numbers, 0-dim float64."""
        return self._sum

    def dot(self, x: Tensor) -> Tensor:
        """Sum of the products with a vector of this length, 0-dim float64."""
        return self._added((numbers * x[part]).sum() for part, numbers in self._parts())

    def dense(self) -> Tensor:
        """All numbers, a new tensor `(num_blocks,)`."""
        written = self.values.new_empty(len(self))
        for part, numbers in self._parts():
            written[part] = numbers
        return written

    def to(self, device: torch.device) -> Runs:
        return Runs(self.values.to(device), self.ends)

    @cached_property
    def _sum(self) -> Tensor:
        return self._added(numbers.sum() for _, numbers in self._parts())

    def _added(self, sums: Iterator[Tensor]) -> Tensor:
        return sum(sums, self.values.new_zeros(()))

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, len(self), _PART):
            part = slice(begin, begin + _PART)
            yield part, self[part]

    def _runs_of(self, begin: int, count: int) -> list[int]:
        """The runs in which some numbers begin and end."""
        outer = torch.tensor([begin, begin + count - 1])
        return torch.searchsorted(self.ends, outer, right=True).tolist()
