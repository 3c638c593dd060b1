"""Budgets: how much of a resource which part of the network may keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from mmsmart.functional import Cost, Limit

RESOURCES = ('params', 'macs', 'latency')

# Share by which a sum of latencies, which are no whole numbers, may be off.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Target:
    """How much of a resource to remove from a part of the network.

    Args:
        part: Pattern over layer names; '' is the whole network.
        resource: 'params', 'macs' or 'latency'.
        sparsity: Share to remove, in [0, 1).
    """

    part: str
    resource: str
    sparsity: float


def read_targets(sparsity: float | dict[str, Any], resource: str = 'params') -> list[Target]:
    """`smart.sparsity` as a list of targets: a number, or a dict by resource, by part, or by both.

    Args:
        sparsity: 0.8; `dict(params=0.6, macs=0.5)`, which both have to hold;
            `dict(backbone=0.8, neck=0.6)`, each met by itself; or, for a part,
            `dict(backbone=dict(params=0.6, macs=0.5))`.
        resource: What a plain number counts.

    Raises:
        ValueError: For anything else, or a number outside [0, 1).

    Example:
        >>> read_targets({'backbone': 0.8, 'neck': {'macs': 0.5}})[1]
        Target(part='neck', resource='macs', sparsity=0.5)
    """
    if resource not in RESOURCES:
        raise ValueError(f'resource: got {resource!r}, allowed are {RESOURCES}.')
    if not isinstance(sparsity, dict):
        check_sparsity(sparsity)
        return [Target('', resource, sparsity)]
    named = [key for key in sparsity if key in RESOURCES]
    if not sparsity or (named and len(named) < len(sparsity)):
        raise ValueError(
            f'sparsity: expected keys that are all resources {RESOURCES} or all parts of the '
            f'model, got {list(sparsity)}. For a part, write dict(backbone=dict(params=0.6, '
            'macs=0.5)).'
        )
    if named:
        return [replace(target, part='') for target in _of_part('', sparsity, resource)]
    return [t for part, wanted in sparsity.items() for t in _of_part(part, wanted, resource)]


def _of_part(part: str, wanted: Any, resource: str) -> list[Target]:
    if not isinstance(part, str) or (isinstance(wanted, dict) and not wanted):
        raise ValueError(
            f'sparsity: expected part = number, or part = dict by resource, got {part!r}: {wanted}.'
        )
    if not isinstance(wanted, dict):
        wanted = {resource: wanted}
    for key, share in wanted.items():
        if key not in RESOURCES:
            raise ValueError(f'sparsity[{part!r}]: unknown key {key!r}; allowed are {RESOURCES}.')
        try:
            check_sparsity(share)
        except ValueError as error:
            raise ValueError(f'{error} (in sparsity[{part or key!r}])') from error
    return [Target(part, key, share) for key, share in wanted.items()]


def expect_fixed(targets: Iterable[Target], n: int, m: int) -> None:
    """Refuse targets that N of M contradicts, where it fixes the density of every layer.

    Raises:
        ValueError: For a sparsity that N and M do not give.
    """
    for target in targets:
        if abs(target.sparsity - (1 - n / m)) > 1e-9:
            raise ValueError(
                f'sparsity: {target.sparsity} contradicts the block {n}:{m}, which removes '
                f'{1 - n / m:g} of every layer. Leave `sparsity` out, or write {1 - n / m:g}.'
            )


@dataclass(frozen=True)
class Budget:
    """What a part of the network may spend of a resource.

    Args:
        target: What was asked for.
        cost: What a mask over the part's blocks spends.
        total: What it spends dense.
        amount: What may be kept of it.
        unit: What that is counted in.
    """

    target: Target
    cost: Cost
    total: float
    amount: float
    unit: str

    @property
    def limit(self) -> Limit:
        return self.limit_at(1.0)

    def limit_at(self, removed: float) -> Limit:
        """The limit while only this share of what is to be removed is removed; 1 is all of it."""
        amount = self.total - removed * (self.total - self.amount) if removed < 1 else self.amount
        if self.target.resource == 'latency':  # the only costs whose sums are rounded
            amount = min(amount * (1 + _ROUNDING), self.total)
        return Limit(self.cost, amount)

    def spent(self, mask: Tensor) -> float:
        """The cost of a mask; what is above the budget by no more than rounding is the budget."""
        cost = self.cost.of(mask)
        return self.amount if self.amount < cost <= self.limit.budget else cost

    def to(self, device: torch.device) -> Budget:
        return replace(self, cost=self.cost.to(device))

    def __str__(self) -> str:
        part = f' of {self.target.part}' if self.target.part else ''
        return (
            f'{self.amount:.8g} of {self.total:.8g} {self.unit}{part} '
            f'(sparsity {self.target.sparsity:g})'
        )


def make_budget(target: Target, cost: Cost, total: float, unit: str) -> Budget:
    """The budget of a target: its share of the total."""
    amount = budget_for(torch.tensor(total, dtype=torch.float64), target.sparsity)
    return Budget(target, cost, total, amount, unit)


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity that is not a number in [0, 1).

    Raises:
        ValueError: Saying what is allowed.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise ValueError(f'sparsity: expected a number in [0, 1), got {sparsity!r}.')
    if not 0 <= sparsity < 1:
        raise ValueError(
            f'sparsity: {sparsity!r} is outside [0, 1). It is the share of the weights to remove: '
            '0.8 keeps one weight in five.'
        )


def budget_for(cost: Tensor, sparsity: float) -> float:
    """The cost that may be kept: `sum(cost) * (1 - sparsity)`, without binary rounding of the rate.

    Raises:
        ValueError: If `sparsity` is outside [0, 1).

    Example:
        >>> budget_for(torch.ones(1000), 0.8)  # and not 199.99999999999997
        200.0
    """
    check_sparsity(sparsity)
    return float(Decimal(float(cost.sum())) * (1 - Decimal(repr(float(sparsity)))))
