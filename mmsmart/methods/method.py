"""What a pruning method decides, and what all methods that cut by a score have in common.

A method owns the masks between the beginning of the search and its end; the weights they multiply,
the budget and the last cut are the same for all, see :mod:`mmsmart.masking`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.importance import magnitude
from mmsmart.plans import Plan

SCOPES = ('network', 'layer')


class Method:
    """One way to decide which blocks stay; subclasses are dataclasses of their settings.

    The order of calls: :meth:`begin` once, then :meth:`backward` and :meth:`advance` around each
    step of the optimiser, then :meth:`finish`. All of them run while the parameters hold the
    weights that are trained (not those times the mask). At the end of the search the first blocks
    of the ranking that fit the budget stay, whatever the method.

    Attributes:
        one_shot: The masks are hard from the beginning of the search on.
        learns: The importance has gradients, and an optimiser of its own moves it.
        init: Which scores the importance starts from; None leaves that to `smart.importance.init`.
        progress: Of the search, in [0, 1]; to be set before a step, for the mask after it.
        restarted: The optimiser has to forget what it knows of the pruned weights.
    """

    one_shot = False
    learns = False
    init: str | None = 'magnitude'
    progress = 0.0
    restarted = False

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        """In which order blocks are cut; by default, that of their importance."""
        return importance

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        """Decide the first mask."""

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        """What multiplies the blocks now, `(num_blocks,)`; by default, 1 for what fits first."""
        return plan.top(self.ranking(plan, importance))

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        """Take the gradient of the mask: the sum over every block of w ∂L/∂(w f)."""

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        """The optimiser has stepped: decide the next mask."""

    def finish(self, plan: Plan, importance: nn.Parameter) -> None:
        """The search ends: the parameters hold the weights that are about to be cut."""

    def __str__(self) -> str:
        settings = [f'{x.name}={getattr(self, x.name)!r}' for x in fields(self) if x.init]
        return f'{type(self).__name__}({", ".join(settings)})'

    def state_dict(self) -> dict[str, Any]:
        """A copy of what changes while the method runs: fields that are no settings."""
        changing = {item.name: getattr(self, item.name) for item in fields(self) if not item.init}
        return copy.deepcopy(changing)

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, _on(device, value))


@dataclass
class Gradual(Method):
    """Hard masks that remove more and more of the network while it trains.

    Blocks that a mask removes get no gradient, but keep their weights and may come back.

    Attributes:
        kept: The mask, bool `(num_blocks,)`.
        steps: Steps taken.

    Args:
        interval: Steps between two masks, 1 or more.
        scope: 'network' for one threshold over all layers, 'layer' to cut the same share of each.
    """

    interval: int = 1
    scope: str = 'network'
    kept: Tensor | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        expect(self, 'interval', is_count(self.interval), 'an integer of at least 1')
        expect(self, 'scope', self.scope in SCOPES, f'one of {SCOPES}')

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        return within_layers(plan, importance) if self.scope == 'layer' else importance

    def removed(self, progress: float) -> float:
        """How much of what is to be removed is removed at this progress, in [0, 1]."""
        return cubic(progress)

    def begin(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        self.cut(plan, importance)

    def mask(self, plan: Plan, importance: Tensor) -> Tensor:
        return self.kept.float()

    def advance(self, plan: Plan, importance: nn.Parameter, temperature: float | None) -> None:
        self.steps += 1
        self.score(plan, importance)
        if self.steps % self.interval == 0:
            self.cut(plan, importance)

    def score(self, plan: Plan, importance: nn.Parameter) -> None:
        """Bring the importance up to date; by default, to the magnitudes of the weights."""
        importance.data = magnitudes(plan)

    def cut(self, plan: Plan, importance: nn.Parameter) -> None:
        """Decide the mask anew."""
        ranking = self.ranking(plan, importance.detach())
        self.kept = plan.top(ranking, self.removed(self.progress)).bool()


def cubic(progress: float) -> float:
    """Zhu and Gupta's ramp (arXiv 1710.01878, equation 1): 1 - (1 - p)^3, fast first, then slower.

    Example:
        >>> cubic(0.0), cubic(0.5), cubic(1.0)
        (0.0, 0.875, 1.0)
    """
    return 1 - (1 - progress) ** 3


def magnitudes(plan: Plan) -> Tensor:
    """Mean |w| of every block on the network's common scale, of the weights held now."""
    return plan.first(magnitude(plan.layers))


def within_layers(plan: Plan, scores: Tensor) -> Tensor:
    """Rank of each block among those of its layer, in (0, 1): the largest is next to 1.

    One threshold over the network then cuts the same share of every layer.

    Example:
        >>> from types import SimpleNamespace
        >>> within_layers(SimpleNamespace(layer_sizes=[2, 2]), torch.tensor([3.0, 1.0, 9.0, 8.0]))
        tensor([0.7500, 0.2500, 0.7500, 0.2500])
    """
    return torch.cat(
        [(part.argsort().argsort() + 0.5) / len(part) for part in scores.split(plan.layer_sizes)]
    ).to(scores.dtype)


def is_count(value: Any) -> bool:
    """Whether this is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def expect(method: Method, name: str, holds: bool, allowed: str) -> None:
    """Refuse a setting that does not hold.

    Raises:
        ValueError: Naming the config's key, what it got and what is allowed.
    """
    if not holds:
        raise ValueError(
            f'smart.method_cfg.{name}: got {getattr(method, name)!r}, expected {allowed}.'
        )


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(device, each) for each in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
