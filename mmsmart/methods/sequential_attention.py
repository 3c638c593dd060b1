"""SequentialAttention++: softmax masks over the blocks of each layer, inside AC/DC."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from mmsmart.methods.method import Method, expect, is_count, within_layers
from mmsmart.plans import Plan


@dataclass
class SequentialAttention(Method):
    """Every block is multiplied by its attention, N times a softmax over the N blocks of its layer.

    The attention learns beside the weights. After a dense start come cycles of three phases of the
    same length: the blocks of least attention leave gradually, what is left trains on, and all
    train again; then a last, longer phase in which blocks leave. The optimiser starts anew with
    each phase. At the end attentions go into the weights that stay.

    Source: Yasuda et al., arXiv 2402.17902, Algorithm 1, sections 3.1 and 4.2, appendix C.1: the
    same sparsity in every layer, the exponential ramp with c = 4, attentions clipped to
    [density, 1/density], and a run of 10 % dense, 6 cycles of 10 %, 15 % in which blocks leave and
    15 % sparse (here, the fine-tuning). The paper does not say how a cycle is divided, nor how
    fast attention learns (`smart.importance.lr`).

    Attributes:
        kept: The mask beside the attention, bool `(num_blocks,)`.
        phase: Number of the phase.

    Args:
        cycles: Cycles of the search.
        steepness: c of the ramp, > 0.
    """

    cycles: int = 6
    steepness: float = 4.0
    kept: Tensor | None = field(default=None, init=False)
    phase: int = field(default=0, init=False)
    density: float = field(default=1.0, init=False)

    learns = True
    init = 'zero'

    def __post_init__(self) -> None:
        expect(self, 'cycles', is_count(self.cycles), 'an integer of at least 1')
        holds = isinstance(self.steepness, (int, float)) and self.steepness > 0
        expect(self, 'steepness', holds, 'a number above 0')
        # Lengths of the phases, in parts of the run: dense, (leave, sparse, dense) ..., leave.
        self._lengths = [10.0, *[10 / 3] * 3 * self.cycles, 15.0]

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        return within_layers(plan, importance)

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        self.kept = torch.ones_like(importance, dtype=torch.bool)
        self.density = float(plan.top(importance.detach()).mean())

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        return self._attention(plan, importance) * self.kept

    def _attention(self, plan: Plan, importance: Tensor) -> Tensor:
        parts = [len(part) * part.softmax(0) for part in importance.split(plan.layer_sizes)]
        return torch.cat(parts).clamp(self.density, 1 / self.density)

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        leaf = importance.detach().requires_grad_()
        with torch.enable_grad():
            self._attention(plan, leaf).backward(grad_mask * self.kept)
        importance.grad = leaf.grad

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        was = self.phase
        self.phase, within = self._where(self.progress)
        self.restarted = self.phase != was
        last = self.phase == len(self._lengths) - 1
        if last or self.phase % 3 == 1:
            ramp = math.expm1(-self.steepness * within) / math.expm1(-self.steepness)
            ranking = self.ranking(plan, importance.detach())
            self.kept = plan.top(ranking, ramp).bool()
        elif self.phase % 3 == 0:
            self.kept = torch.ones_like(self.kept)

    def finish(self, plan: Plan, importance: nn.Parameter) -> None:
        attention = self._attention(plan, importance.detach())
        weights = [weight.data for weight in plan.weights]
        plan.scale(weights, attention, out=weights)

    def _where(self, progress: float) -> tuple[int, float]:
        """Number of the phase at this progress, and the progress within it."""
        ends = list(accumulate(self._lengths))
        at = progress * ends[-1]
        phase = min(bisect_right(ends, at), len(ends) - 1)
        length = self._lengths[phase]
        return phase, min((at - ends[phase] + length) / length, 1.0)
