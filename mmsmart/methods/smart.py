"""SMART: separate importance, differentiable top-k, falling temperature."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmsmart.importance import live_magnitude
from mmsmart.methods.method import Method, expect, magnitudes
from mmsmart.plans import Plan


@dataclass
class Smart(Method):
    """A soft top-k over the importances of all blocks, which are trained beside the weights.

    Source: arXiv 2403.19969, Figure 1 and section 3.

    Attributes:
        temperature: τ of the mask that is in the weights now.
        thresholds: θ of it, as the plan solved for them.

    Args:
        tied: For ablations: the importance is no parameter of its own but the magnitude of its
            block, and its gradient moves the weights.
    """

    tied: bool = False
    temperature: float | None = field(default=None, init=False)
    thresholds: Tensor | list[Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        expect(self, 'tied', isinstance(self.tied, bool), 'True or False')
        self.learns = not self.tied
        self.init = 'magnitude' if self.tied else None

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        self._solve(plan, importance, temperature)

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        return plan.soft_mask(importance, self.thresholds, self.temperature)

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        grad = plan.pull_back(importance.detach(), self.thresholds, self.temperature, grad_mask)
        if self.tied:
            with torch.enable_grad():
                plan.first(live_magnitude(plan.layers)).backward(grad)
        else:
            importance.grad = grad

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        if self.tied:
            importance.data = magnitudes(plan)
        self._solve(plan, importance, self.temperature if temperature is None else temperature)

    def finish(self, plan: Plan, importance: nn.Parameter) -> None:
        self.temperature = self.thresholds = None

    def _solve(self, plan: Plan, importance: Tensor, temperature: float | None) -> None:
        if temperature is None:
            raise ValueError('temperature: SMART needs one above 0 for its first mask, got None.')
        self.thresholds = plan.thresholds(importance.detach(), temperature, self.thresholds)
        self.temperature = temperature
