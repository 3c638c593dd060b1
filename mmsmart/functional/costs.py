"""What a mask costs: a sum over blocks, curves over the density of layers, or both.

A cost knows what the kept blocks cost together, its derivative by every block's mask, and what each
block would add to a hard mask. Every cost grows with every block of the mask, which is all that the
solver of :mod:`mmsmart.functional.limits` asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .runs import Runs


class Cost(Protocol):
    """What a threshold is solved for."""

    def of(self, mask: Tensor) -> float:
        """What is spent by a mask `(num_blocks,)`."""

    def marginal(self, mask: Tensor) -> Tensor:
        """Derivative of :meth:`of` by the mask of every block, `(num_blocks,)`."""


class BlockCost(Cost, Protocol):
    """What a hard top-k is taken for."""

    def increments(self, mask: Tensor) -> Tensor:
        """What each block would add to a mask without it, `(num_blocks,)`."""


@dataclass(frozen=True)
class LinearCost:
    """Every block has a cost of its own: Σ c_i f_i.

    Args:
        cost: c > 0, `(num_blocks,)`; held by runs of equal ones, in float64.

    Example:
        >>> LinearCost(torch.tensor([4.0, 2.0, 1.0]).double()).of(torch.tensor([1.0, 0.0, 1.0]))
        5.0
    """

    cost: Runs | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, 'cost', Runs.of(self.cost))

    @property
    def is_whole(self) -> bool:
        """Whether sums of it are exact in float64, in any order."""
        return bool((self.cost.values == self.cost.values.round()).all())

    def of(self, mask: Tensor) -> float:
        return float(self.cost.dot(mask))

    def marginal(self, mask: Tensor) -> Tensor:
        return self.cost.dense()

    def increments(self, mask: Tensor) -> Tensor:
        return self.cost.dense()

    def to(self, device: torch.device) -> LinearCost:
        return LinearCost(self.cost.to(device))


@dataclass(frozen=True)
class Curves:
    """Piecewise linear functions of a density in [0, 1], one a layer, that never fall.

    Args:
        density: Points, rising from 0, `(num_layers, points)`; padded above 1.
        value: The functions there, `(num_layers, points)`; padded with the last.

    Example:
        >>> curves = Curves.through([[(0, 1.0), (0.5, 3.0), (1, 4.0)], [(0, 0.0), (1, 8.0)]])
        >>> value, slope = curves.at(torch.tensor([0.25, 0.25]).double())
        >>> value.tolist(), slope.tolist()
        ([2.0, 2.0], [4.0, 8.0])
    """

    density: Tensor
    value: Tensor

    @classmethod
    def through(cls, points: Sequence[Sequence[tuple[float, float]]]) -> Curves:
        """The curves through these points, `(density, value)` from density 0 to 1."""
        longest = max(len(curve) for curve in points)
        rows = [
            [*curve, *((2.0 + i, curve[-1][1]) for i in range(longest - len(curve)))]
            for curve in points
        ]
        both = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        return cls(*(x.contiguous() for x in both))

    def at(self, density: Tensor, layer: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values and slopes at one density a layer; at a kink the slope on its left.

        Args:
            density: `(num_layers,)`, or one for each entry of `layer`.
            layer: Which curve to read, int64; all in their order if not given.
        """
        x, y = self.density, self.value
        if layer is not None:
            x, y = x[layer], y[layer]
        # Rounding must not carry a full layer into the padding.
        at = density.clamp(0.0, 1.0).unsqueeze(-1)
        after = torch.searchsorted(x, at).clamp(1, x.shape[-1] - 1)
        (x0, x1), (y0, y1) = ((v.gather(-1, after - 1), v.gather(-1, after)) for v in (x, y))
        slope = (y1 - y0) / (x1 - x0)
        return (y0 + slope * (at - x0)).squeeze(-1), slope.squeeze(-1)

    def to(self, device: torch.device) -> Curves:
        return Curves(self.density.to(device), self.value.to(device))


@dataclass(frozen=True)
class CurveCost:
    """Blocks with costs of their own, and layers with curves: Σ b_i f_i + Σ_l y_l(ρ_l).

    ρ_l = Σ s_i f_i / Σ s_i over the blocks of layer l is the layer's density. Curves need not be
    convex.

    Args:
        linear: b ≥ 0, float64 `(num_blocks,)`.
        sizes: s > 0, weights of every block, float64 `(num_blocks,)`.
        layer: Layer of every block, int64 `(num_blocks,)`.
        curves: y, one a layer.

    Example:
        >>> cost = CurveCost(
        ...     linear=torch.zeros(4).double(),
        ...     sizes=torch.ones(4).double(),
        ...     layer=torch.tensor([0, 0, 1, 1]),
        ...     curves=Curves.through([[(0, 1.0), (0.5, 3.0), (1, 4.0)], [(0, 0.0), (1, 8.0)]]),
        ... )
        >>> half = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> cost.of(half), cost.increments(half).tolist()
        (7.0, [1.0, 1.0, 4.0, 4.0])
    """

    linear: Tensor
    sizes: Tensor
    layer: Tensor
    curves: Curves
    _whole: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, '_whole', self._by_layer(torch.ones_like(self.sizes)))

    def of(self, mask: Tensor) -> float:
        values, _ = self.curves.at(self._density(mask))
        return float((self.linear * mask).sum() + values.sum())

    def marginal(self, mask: Tensor) -> Tensor:
        _, slopes = self.curves.at(self._density(mask))
        price = self.linear + self.sizes * (slopes / self._whole)[self.layer]
        # Blocks that cost nothing share the fate of those that cost next to nothing.
        return price.clamp_min(1e-9 * float(price.max()))

    def increments(self, mask: Tensor) -> Tensor:
        density = self._density(mask)
        now, _ = self.curves.at(density)
        more = density[self.layer] + self.sizes / self._whole[self.layer]
        then, _ = self.curves.at(more, self.layer)
        return self.linear + then - now[self.layer]

    def to(self, device: torch.device) -> CurveCost:
        moved = (x.to(device) for x in (self.linear, self.sizes, self.layer))
        return CurveCost(*moved, self.curves.to(device))

    def _by_layer(self, mask: Tensor) -> Tensor:
        sums = torch.zeros(len(self.curves.value), dtype=torch.float64, device=mask.device)
        return sums.index_add_(0, self.layer, self.sizes * mask)

    def _density(self, mask: Tensor) -> Tensor:
        return self._by_layer(mask) / self._whole
