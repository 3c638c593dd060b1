"""SMART: separate importance, differentiable top-k, falling temperature, and curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmsmart.functional import blend_log_squares
from mmsmart.importance import live_magnitude
from mmsmart.methods.method import SCOPES, Method, expect, magnitudes, within_layers
from mmsmart.plans import BlockPlan, JointPlan, Plan

# Steps that the running mean of the squared gradients looks back on.
_MEMORY = 100


@dataclass
class Smart(Method):
    """A soft top-k over the importances of all blocks, which are trained beside the weights.

    Source: arXiv 2403.19969, Figure 1 and section 3. What is ours is the curvature: a network that
    was trained out has no slope to learn an importance from, ∂L/∂f being noise around zero, but the
    size of that noise tells what the loss would rise by without the block (the diagonal of Fisher's
    matrix). So the importance follows, besides what its optimiser learns, the logarithm of the
    running mean of (∂L/∂f)², standardised over the network.

    Attributes:
        temperature: τ of the mask that is in the weights now.
        thresholds: θ of it, as the plan solved for them.
        log_squares: Logarithm of the running mean of (∂L/∂f)², `(num_blocks,)`, with curvature.
        centre: Its mean over the network.
        spread: Its standard deviation; infinity before the first step.
        steps: Steps it was taken over.

    Args:
        curvature: Standard deviation over the network of what curvature gives the importance, as
            `smart.importance.curvature` has it; 0 leaves all to the optimiser, as in the paper.
        scope: 'network' for one top-k over all layers; 'layer', for ablations, for one in each,
            which removes the same share of all.
        tied: For ablations: the importance is no parameter of its own but the magnitude of its
            block, and its gradient moves the weights. There is no curvature then, and after the
            first mask its standard deviation is 1, whatever `smart.importance.scale` is.
    """

    curvature: float = 0.0
    scope: str = 'network'
    tied: bool = False
    temperature: float | None = field(default=None, init=False)
    thresholds: Tensor | list[Tensor] | None = field(default=None, init=False)
    log_squares: Tensor | None = field(default=None, init=False)
    centre: Tensor | None = field(default=None, init=False)
    spread: Tensor | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        holds = isinstance(self.curvature, (int, float)) and 0 <= self.curvature < math.inf
        expect(self, 'curvature', holds and self.curvature is not True, 'a number, 0 or more')
        expect(self, 'scope', self.scope in SCOPES, f'one of {SCOPES}')
        expect(self, 'tied', isinstance(self.tied, bool), 'True or False')
        self._by_layer: JointPlan | None = None
        self.learns = not self.tied
        self.init = 'magnitude' if self.tied else None

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        return within_layers(plan, importance) if self.scope == 'layer' else importance

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        if self.scope == 'layer' and not isinstance(plan, BlockPlan):
            raise ValueError(
                "smart.method_cfg.scope: 'layer' is for blocks under one sparsity; for parts of "
                'the network, coupled channels and N of M leave it out.'
            )
        if self.curvature and not self.tied:
            # As good as none: they count for nothing where a first gradient overflows.
            self.log_squares = torch.full_like(importance.data, -80.0)
            self.centre = importance.new_tensor(0.0)
            self.spread = importance.new_tensor(torch.inf)
        self._solve(plan, importance, temperature)

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        return self._topks(plan).soft_mask(importance, self.thresholds, self.temperature)

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        known = importance.detach(), self.thresholds, self.temperature
        grad = self._topks(plan).pull_back(*known, grad_mask)
        if self.tied:
            with torch.enable_grad():
                plan.first(live_magnitude(plan.layers)).backward(grad)
        else:
            importance.grad = grad
        if self.log_squares is not None:
            self._follow(importance, grad_mask)

    def _follow(self, importance: nn.Parameter, grad_mask: Tensor) -> None:
        """Move the importance by as much as this gradient changes the score of the curvature."""
        self._add(-self.curvature, importance.data)
        self.steps += 1
        rate = max(1 / self.steps, 1 / _MEMORY)
        self.centre, self.spread = blend_log_squares(self.log_squares, grad_mask, rate)
        self._add(self.curvature, importance.data)

    def _add(self, weight: float, importance: Tensor) -> None:
        share = weight / self.spread
        importance.addcmul_(self.log_squares, share).sub_(share * self.centre)

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        if self.tied:
            importance.data = magnitudes(plan)
        self._solve(plan, importance, self.temperature if temperature is None else temperature)

    def finish(self, plan: Plan, importance: nn.Parameter) -> None:
        self.temperature = self.thresholds = self._by_layer = None
        self.log_squares = self.centre = self.spread = None

    def _solve(self, plan: Plan, importance: Tensor, temperature: float | None) -> None:
        if temperature is None:
            raise ValueError('temperature: SMART needs one above 0 for its first mask, got None.')
        topks = self._topks(plan)
        self.thresholds = topks.thresholds(importance.detach(), temperature, self.thresholds)
        self.temperature = temperature

    def _topks(self, plan: Plan) -> Plan:
        """What is solved for: the plan, or one for each of its layers."""
        if self.scope == 'network':
            return plan
        if self._by_layer is None:
            self._by_layer = JointPlan(plan.by_layer())
        return self._by_layer
