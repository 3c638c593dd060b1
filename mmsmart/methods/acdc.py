"""AC/DC: alternating compressed and decompressed training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmsmart.methods.method import Method, expect, is_count, magnitudes
from mmsmart.plans import Plan


@dataclass
class ACDC(Method):
    """Phases at the full sparsity, cut by magnitude, alternate with dense ones.

    A cut sets the pruned weights to zero, from where a dense phase grows them again; it forgets the
    optimiser's momentum as it begins. The search begins cut, since it starts from a trained
    network, and ends dense; the cut at its end is the last.

    Source: Peste et al., arXiv 2106.12379, and their code: one threshold over the network, phases
    of 5 % of the run. Here magnitudes are taken over their layer's mean, as for every method.

    Attributes:
        kept: The mask of the last cut, bool `(num_blocks,)`.
        dense: Whether this phase is dense.

    Args:
        phases: Phases of the search, an even number; 12 are 5 % of a run that searches for 60 %.
    """

    phases: int = 12
    kept: Tensor | None = field(default=None, init=False)
    dense: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        holds = is_count(self.phases) and self.phases % 2 == 0
        expect(self, 'phases', holds, 'an even number of at least 2')

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        self._cut(plan, importance)

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        return torch.ones_like(importance) if self.dense else self.kept.float()

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        was_dense = self.dense
        if not was_dense:  # momentum has moved them
            self._zero_pruned(plan)
        importance.data = magnitudes(plan)
        self.dense = min(int(self.progress * self.phases), self.phases - 1) % 2 == 1
        self.restarted = self.dense and not was_dense
        if was_dense and not self.dense:
            self._cut(plan, importance)

    def _cut(self, plan: Plan, importance: nn.Parameter) -> None:
        self.kept = plan.top(importance.detach()).bool()
        self._zero_pruned(plan)

    def _zero_pruned(self, plan: Plan) -> None:
        weights = [weight.data for weight in plan.weights]
        plan.scale(weights, self.kept.float(), out=weights)
