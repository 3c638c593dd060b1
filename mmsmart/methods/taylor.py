"""Taylor: what the loss would change by without a block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmsmart.methods.method import Gradual, expect
from mmsmart.plans import Plan


@dataclass
class Taylor(Gradual):
    """The smallest (Σ w ∂L/∂w)² of a block leaves, some of the blocks every few steps, for good.

    The squares are averaged over the steps between two cuts, and over cuts with momentum. What has
    left is last in the order: of blocks of several sizes, a small one may come back where it fits
    into what the others leave of the budget.

    Source: Molchanov et al., arXiv 1906.10771, and their code: a gate for every unit, a cut every
    30 steps, 32 cuts, momentum 0.9, one threshold over the network.

    Attributes:
        sums: Sum of the squares since the last cut, `(num_blocks,)`.
        average: Their average over cuts, `(num_blocks,)`.

    Args:
        interval: Steps between two cuts.
        momentum: Share of the average that a cut keeps, in [0, 1).
    """

    interval: int = 30
    momentum: float = 0.9
    sums: Tensor | None = field(default=None, init=False)
    average: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1
        expect(self, 'momentum', holds, 'a number in [0, 1)')

    def removed(self, progress: float) -> float:
        return progress

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        if self.average is None and self.sums is not None:  # a search may end before its first cut
            importance = _logarithms(self.sums)
        return super().ranking(plan, importance)

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        squares = grad_mask.square()
        # An overflow of a loss scaler, whose step is left out, would stay in the average for good.
        squares = squares.where(squares.sum().isfinite(), 0)
        self.sums = squares if self.sums is None else self.sums + squares

    def score(self, plan: Plan, importance: nn.Parameter) -> None:
        if self.steps % self.interval:
            return
        new, self.sums = self.sums / self.interval, None
        old = self.average
        self.average = new if old is None else torch.lerp(new, old, self.momentum)
        scores = _logarithms(self.average)
        importance.data = scores.where(self.kept, scores.min() - 1)


def _logarithms(squares: Tensor) -> Tensor:
    return squares.clamp_min(torch.finfo(torch.float32).tiny).log()
