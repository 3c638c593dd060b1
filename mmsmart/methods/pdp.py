"""PDP: parameter-free differentiable pruning."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmsmart.importance import live_squares
from mmsmart.methods.method import Method, expect, magnitudes
from mmsmart.plans import Plan


@dataclass
class PDP(Method):
    """A soft mask that is a function of the weights: σ((s - t²)/τ), s the mean square of a block.

    t lies half-way between the weakest kept and the strongest pruned block of the layer; s then
    takes the place of w² in the paper's softmax over (t², w²). What each layer is to lose is found
    once, by one cut of magnitudes over the network, and grows linearly over the search. The
    gradient of the mask goes on to the weights; blocks above 1/2 stay at its end.

    Source: Cho et al., arXiv 2305.11203. τ = 1e-4 is that of a public re-creation; others have
    1e-5.

    Attributes:
        densities: What each layer keeps in the end, `(num_layers,)`.
        squared: t² of every block's layer, `(num_blocks,)`.

    Args:
        tau: τ > 0, on the scale of squared weights.
    """

    tau: float = 1e-4
    densities: Tensor | None = field(default=None, init=False)
    squared: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        holds = isinstance(self.tau, (int, float)) and self.tau > 0
        expect(self, 'tau', holds, 'a number above 0')

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        kept = plan.top(magnitudes(plan))
        self.densities = torch.stack([part.mean() for part in kept.split(plan.layer_sizes)])
        self.advance(plan, importance, temperature)

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        return torch.sigmoid(importance / self.tau)

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        mask = self.mask(plan, importance.detach())
        with torch.enable_grad():
            squares = plan.average(live_squares(plan.layers))
            squares.backward(grad_mask * mask * (1 - mask) / self.tau)

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        squares = plan.average(live_squares(plan.layers)).detach()
        parts = squares.split(plan.layer_sizes)
        densities = (1 - self.progress * (1 - self.densities)).tolist()
        self.squared = torch.cat(
            [_between(part, density).expand(len(part)) for part, density in zip(parts, densities)]
        )
        importance.data = squares - self.squared


def _between(squares: Tensor, density: float) -> Tensor:
    """The square of what lies half-way between the weakest kept and the strongest pruned block."""
    kept = round(density * len(squares))
    norms = squares.sqrt().sort(descending=True).values
    weakest = norms[kept - 1] if kept else norms[0]
    strongest = norms[kept] if kept < len(norms) else norms.new_zeros(())
    return ((weakest + strongest) / 2).square()
