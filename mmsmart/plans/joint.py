"""Plans side by side: parts of a network with budgets of their own, and other patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import BlockLayer, Excluded
from mmsmart.budget import Budget, Target, expect_fixed
from mmsmart.latency import LatencyTable
from mmsmart.layer_rules import matches
from mmsmart.plans.blocks import BlockPlan
from mmsmart.plans.n_of_m import NOfMPlan

_UNUSED = 'not run in the prediction for one image: it costs no MACs'


class JointPlan:
    """Several plans one after the other, each with budgets of its own.

    Attributes and methods are those of :class:`mmsmart.plans.BlockPlan`; vectors of blocks are
    those of the plans joined, thresholds a list of theirs.

    Args:
        plans: At least one; no layer is in two of them.
        excluded: What stays dense.
    """

    def __init__(
        self, plans: Sequence[BlockPlan | NOfMPlan], excluded: Sequence[Excluded] = ()
    ) -> None:
        self.plans, self.excluded = list(plans), list(excluded)
        self._lengths = [plan.num_blocks for plan in self.plans]

    @property
    def layers(self) -> list[BlockLayer]:
        return [layer for plan in self.plans for layer in plan.layers]

    @property
    def layer_sizes(self) -> list[int]:
        return [size for plan in self.plans for size in plan.layer_sizes]

    @property
    def budgets(self) -> list[Budget]:
        return [budget for plan in self.plans for budget in plan.budgets]

    @property
    def num_blocks(self) -> int:
        return sum(self._lengths)

    @property
    def weights(self) -> list[nn.Parameter]:
        return [weight for plan in self.plans for weight in plan.weights]

    def follow(self, device: torch.device) -> None:
        for plan in self.plans:
            plan.follow(device)

    def spread(self, mask: Tensor) -> Iterator[Tensor]:
        for plan, part in self._each(mask):
            yield from plan.spread(part)

    def scale(self, latent: Sequence[Tensor], mask: Tensor, out: Sequence[Tensor]) -> None:
        parts = zip(self._each(mask), self._by_plan(latent), self._by_plan(out))
        for (plan, f), w, masked in parts:
            plan.scale(w, f, masked)

    def unmask(
        self, latent: Sequence[Tensor], grads: Sequence[Tensor | None], mask: Tensor
    ) -> Tensor:
        parts = zip(self._each(mask), self._by_plan(latent), self._by_plan(grads))
        return torch.cat([plan.unmask(w, grad, f) for (plan, f), w, grad in parts])

    def thresholds(
        self, importance: Tensor, temperature: float, start: list[Tensor] | None
    ) -> list[Tensor]:
        starts = start or [None] * len(self.plans)
        return [
            plan.thresholds(part, temperature, guess)
            for (plan, part), guess in zip(self._each(importance), starts)
        ]

    def soft_mask(self, importance: Tensor, thresholds: list[Tensor], temperature: float) -> Tensor:
        return torch.cat(
            [
                plan.soft_mask(part, found, temperature)
                for (plan, part), found in zip(self._each(importance), thresholds)
            ]
        )

    def pull_back(
        self, importance: Tensor, thresholds: list[Tensor], temperature: float, grad_mask: Tensor
    ) -> Tensor:
        grads = grad_mask.split(self._lengths)
        return torch.cat(
            [
                plan.pull_back(part, found, temperature, grad)
                for (plan, part), found, grad in zip(self._each(importance), thresholds, grads)
            ]
        )

    def top(self, importance: Tensor, removed: float = 1.0) -> Tensor:
        return torch.cat([plan.top(part, removed) for plan, part in self._each(importance)])

    def spent(self, mask: Tensor) -> list[float]:
        return [cost for plan, part in self._each(mask) for cost in plan.spent(part)]

    def next_cost(self, importance: Tensor, kept: Tensor) -> list[float]:
        return self._of_hard(lambda plan, m, h: plan.next_cost(m, h), importance, kept)

    def average(self, scores: Tensor) -> Tensor:
        return scores

    def first(self, scores: Tensor) -> Tensor:
        return scores

    def pruned(self, kept: Tensor) -> list[tuple[str, nn.Parameter, Tensor]]:
        return [item for plan, part in self._each(kept) for item in plan.pruned(part)]

    def at_floor(self, importance: Tensor, kept: Tensor) -> set[str]:
        return set(self._of_hard(lambda plan, m, h: plan.at_floor(m, h), importance, kept))

    def description(self) -> list[list[Any]]:
        return [row for plan in self.plans for row in plan.description()]

    def _each(self, values: Tensor) -> Iterator[tuple[BlockPlan | NOfMPlan, Tensor]]:
        return zip(self.plans, values.split(self._lengths))

    def _by_plan(self, by_weight: Sequence[Any]) -> Iterator[list[Any]]:
        every = iter(by_weight)
        return (list(islice(every, len(plan.layers))) for plan in self.plans)

    def _of_hard(self, ask: Callable[..., Iterable], importance: Tensor, kept: Tensor) -> list:
        parts = zip(self._each(importance), kept.split(self._lengths))
        return [item for (plan, m), h in parts for item in ask(plan, m, h)]


def plan_blocks(
    layers: Sequence[BlockLayer],
    excluded: Sequence[Excluded],
    targets: Sequence[Target],
    positions: dict[str, int] | None = None,
    table: LatencyTable | None = None,
    least: dict[str, float | None] | None = None,
) -> BlockPlan | NOfMPlan | JointPlan:
    """The plan for layers under targets: one a part of the network, and one for each N of M.

    Args:
        layers: Layers of :func:`mmsmart.blocks.find_layers`.
        excluded: Its excluded weights.
        targets: What to remove.
        positions: See :class:`BlockPlan`.
        table: The same.
        least: The same.

    Raises:
        ValueError: If a layer is in two parts, a part has no layer, a target is that of layers
            whose density N of M fixes, or a budget can't be met.
    """
    excluded, layers = list(excluded), list(layers)
    if any(target.resource == 'macs' for target in targets):
        unused = [layer for layer in layers if not positions.get(layer.name)]
        excluded += [Excluded(layer.name, _UNUSED) for layer in unused]
        layers = [layer for layer in layers if positions.get(layer.name)]
    fixed: dict[tuple[int, int], list[BlockLayer]] = {}
    free = []
    for layer in layers:
        (free if layer.n_of_m is None else fixed.setdefault(layer.n_of_m, [])).append(layer)
    parts: dict[str, list[Target]] = {}
    for target in targets:
        parts.setdefault(target.part, []).append(target)
    plans: list[BlockPlan | NOfMPlan] = []
    if list(parts) == ['']:
        if free:
            plans.append(BlockPlan(free, targets, positions, table, least))
        else:
            for n, m in fixed:  # every layer is one of these
                expect_fixed(targets, n, m)
    else:
        members = _members(free, list(parts))
        for part, wanted in parts.items():
            plans.append(BlockPlan(members[part], wanted, positions, table, least))
        inside = {layer.name for found in members.values() for layer in found}
        excluded += [
            Excluded(layer.name, 'in no part that `sparsity` names')
            for layer in free
            if layer.name not in inside
        ]
    plans += [NOfMPlan(found) for found in fixed.values()]
    if not plans:
        raise ValueError('no prunable layer is run in the prediction for one image.')
    if len(plans) == 1:
        plans[0].excluded = excluded
        return plans[0]
    return JointPlan(plans, excluded)


def _members(layers: Sequence[BlockLayer], parts: Sequence[str]) -> dict[str, list[BlockLayer]]:
    members: dict[str, list[BlockLayer]] = {part: [] for part in parts}
    for layer in layers:
        found = [part for part in parts if matches(part, layer.name)]
        if len(found) > 1:
            raise ValueError(
                f'sparsity: the layer {layer.name!r} belongs to the parts {found}, and two budgets '
                'that share layers can not both be met exactly. Name parts that do not overlap.'
            )
        for part in found:
            members[part].append(layer)
    for part, found in members.items():
        if not found:
            names = ', '.join(repr(layer.name) for layer in layers[:3])
            raise ValueError(
                f'sparsity: the part {part!r} holds no prunable layer. Names look like {names}.'
            )
    return members
