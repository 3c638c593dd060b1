"""Blocks of weights under one or more budgets, with a floor for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsmart.blocks import BlockLayer, Excluded
from mmsmart.budget import Budget, Target, make_budget
from mmsmart.cost import block_cost
from mmsmart.functional import (
    Floors,
    LinearCost,
    limited_topk,
    limits_mask,
    limits_vjp,
    solve_limits,
    tightest,
)
from mmsmart.latency import LatencyTable
from mmsmart.plans.layers import LayerPlan

UNITS = {'params': 'weights', 'macs': 'MACs'}


class BlockPlan(LayerPlan):
    """Blocks of weights: every block is a set of weights of one layer, and costs what it holds.

    Attributes:
        budgets: What may be kept, one a target; the tightest is met, the others hold.
        floors: What every layer keeps at least.

    Args:
        layers: The layers.
        targets: What to remove, all of one part.
        positions: Uses of each layer's weights in one forward pass, by name, for MACs.
        table: Latencies, for latency.
        least: Least density of each layer, by name; None, as for a layer that is not named, is one
            block, and 0 lets a layer be cut off whole.
        excluded: What stays dense.

    Raises:
        ValueError: If the budgets are too small for any block, or for the floors.
    """

    def __init__(
        self,
        layers: Sequence[BlockLayer],
        targets: Sequence[Target],
        positions: dict[str, int] | None = None,
        table: LatencyTable | None = None,
        least: dict[str, float | None] | None = None,
        excluded: Sequence[Excluded] = (),
    ) -> None:
        super().__init__(layers, excluded)
        self._settings = (targets, positions, table, least)
        self.budgets = [self._budget(target, positions, table) for target in targets]
        self.floors = self._floors(least or {})
        self._check()

    def _budget(
        self, target: Target, positions: dict[str, int] | None, table: LatencyTable | None
    ) -> Budget:
        if target.resource == 'latency':
            cost, unit = table.of_blocks(self.layers), table.unit
        else:
            uses = positions if target.resource == 'macs' else None
            cost, unit = LinearCost(block_cost(self.layers, uses)), UNITS[target.resource]
        return make_budget(target, cost, cost.of(torch.ones(self.num_blocks)), unit)

    def _floors(self, least: dict[str, float | None]) -> Floors:
        sizes = [layer.sizes().double() for layer in self.layers]
        shares = [least.get(layer.name) for layer in self.layers]
        weights = [
            float(size.min()) if share is None else share * float(size.sum())
            for size, share in zip(sizes, shares)
        ]
        return Floors(
            torch.cat(sizes), torch.tensor(self.layer_sizes), torch.tensor(weights).double()
        )

    def _check(self) -> None:
        for budget in self.budgets:
            target, where = budget.target, f' of {budget.target.part}' if budget.target.part else ''
            empty = budget.cost.of(torch.zeros(self.num_blocks))
            smallest = float(budget.cost.increments(torch.zeros(self.num_blocks)).min())
            if budget.amount < empty + smallest:
                raise ValueError(
                    f'sparsity: {target.sparsity} leaves{where} a budget of {budget.amount:g} '
                    f'{budget.unit}, less than the smallest block '
                    + (f'and what no block can save ({empty:g} + ' if empty else '(')
                    + f'{smallest:g}). Lower it, or choose smaller blocks.'
                )
            held = self.floors.most(budget.cost)
            if held > budget.amount:
                raise ValueError(
                    f'sparsity: {target.sparsity} leaves{where} a budget of {budget.amount:g} '
                    f'{budget.unit}, but the floors of its {len(self.layers)} layers keep up to '
                    f'{held:g}. Lower it, choose smaller blocks, or lower `min_density` in rules '
                    'of `layers`: without a rule each layer keeps at least one block, 0 lets it '
                    'be cut off whole.'
                )

    @property
    def cost(self) -> Tensor:
        """Cost of every block in the first budget, `(num_blocks,)`; marginal where curved."""
        return self.budgets[0].cost.marginal(torch.ones(self.num_blocks, device=self._device))

    @property
    def _device(self) -> torch.device:
        return self.floors.sizes.device

    def by_layer(self) -> list[BlockPlan]:
        """A plan for each layer: what is asked of all of them, asked of each for itself."""
        plans = [BlockPlan([layer], *self._settings) for layer in self.layers]
        for plan in plans:
            plan.follow(self._device)
        return plans

    def follow(self, device: torch.device) -> None:
        """The model has moved to this device."""
        self.budgets = [budget.to(device) for budget in self.budgets]
        self.floors = self.floors.to(device)

    def thresholds(self, importance: Tensor, temperature: float, start: Tensor | None) -> Tensor:
        """θ of the soft mask that meets the budgets and floors."""
        limits = [budget.limit for budget in self.budgets]
        return solve_limits(importance, limits, temperature, self.floors, start)

    def soft_mask(self, importance: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
        """The soft mask at thresholds, `(num_blocks,)`."""
        return limits_mask(importance, thresholds, temperature, self.floors)

    def pull_back(
        self, importance: Tensor, thresholds: Tensor, temperature: float, grad_mask: Tensor
    ) -> Tensor:
        """∂L/∂m from ∂L/∂f, the thresholds moving with m."""
        first, *others = (budget.limit for budget in self.budgets)
        if not others and isinstance(first.cost, LinearCost):
            price = first.cost.cost  # whatever the mask
        else:
            mask = self.soft_mask(importance, thresholds, temperature)
            price = tightest([first, *others], mask).cost.marginal(mask)
        return limits_vjp(importance, thresholds, temperature, grad_mask, price, self.floors)

    def top(self, importance: Tensor, removed: float = 1.0) -> Tensor:
        """The hard mask of an importance, at a share of what is to be removed."""
        limits = [budget.limit_at(removed) for budget in self.budgets]
        return limited_topk(importance, limits, self.floors)

    def spent(self, mask: Tensor) -> list[float]:
        """What a mask spends of each of :attr:`budgets`."""
        return [budget.spent(mask) for budget in self.budgets]

    def next_cost(self, importance: Tensor, kept: Tensor) -> list[float]:
        """What the most important of the pruned blocks would cost; 0 if nothing is pruned."""
        pruned = ~kept.bool()
        if not bool(pruned.any()):
            return [0.0] * len(self.budgets)
        first = importance.masked_fill(~pruned, -torch.inf).argmax()
        return [float(budget.cost.increments(kept)[first]) for budget in self.budgets]

    def at_floor(self, importance: Tensor, kept: Tensor) -> set[str]:
        """Names of layers that keep no more than their floor asks for."""
        forced = self.floors.forced(importance)
        parts = zip(
            self.layers, kept.bool().split(self.layer_sizes), forced.split(self.layer_sizes)
        )
        return {x.name for x, stays, least in parts if bool((stays == least).all() & least.any())}

    def description(self) -> list[list[Any]]:
        """What tells one plan from another, in numbers, names and lists."""
        return [[layer.name, list(layer.view_shape), list(layer.block)] for layer in self.layers]
