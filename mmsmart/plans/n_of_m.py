"""N of every M: single weights along the input axis, each group with a top-k of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsmart.blocks import BlockLayer, Excluded
from mmsmart.budget import Budget, Target
from mmsmart.functional import LinearCost, rows_mask, rows_topk, rows_vjp, solve_row_thresholds
from mmsmart.plans.layers import LayerPlan


class NOfMPlan(LayerPlan):
    """Of every M weights side by side along the input axis, at most N stay.

    A group at a ragged end holds fewer than M weights; it, too, keeps at most N. There is no budget
    beside: how much is kept follows from N, M and the shapes.

    Attributes and methods are those of :class:`mmsmart.plans.BlockPlan`.

    Args:
        layers: Layers cut into single weights, all with the same `n_of_m`.
        excluded: What stays dense.
    """

    def __init__(self, layers: Sequence[BlockLayer], excluded: Sequence[Excluded] = ()) -> None:
        super().__init__(layers, excluded)
        self.n, self.m = self.layers[0].n_of_m
        self._valid = self._rows(torch.ones(self.num_blocks)).bool()
        amount = float(self._valid.sum(1).clamp_max(self.n).sum())
        total = float(self.num_blocks)
        target = Target(f'{self.n}:{self.m}', 'params', 1 - amount / total)
        cost = LinearCost(torch.ones(self.num_blocks, dtype=torch.float64))
        self.budgets = [Budget(target, cost, total, amount, 'weights')]

    def follow(self, device: torch.device) -> None:
        self._valid = self._valid.to(device)
        self.budgets = [budget.to(device) for budget in self.budgets]

    def thresholds(self, importance: Tensor, temperature: float, start: Tensor | None) -> Tensor:
        rows = self._rows(importance)
        return solve_row_thresholds(rows, self.n, temperature, self._valid, start)

    def soft_mask(self, importance: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
        rows = self._rows(importance)
        return self._flat(rows_mask(rows, thresholds, temperature, self._valid))

    def pull_back(
        self, importance: Tensor, thresholds: Tensor, temperature: float, grad_mask: Tensor
    ) -> Tensor:
        rows = rows_vjp(
            self._rows(importance), thresholds, temperature, self._rows(grad_mask), self._valid
        )
        return self._flat(rows)

    def top(self, importance: Tensor, removed: float = 1.0) -> Tensor:
        kept = self.m - int(removed * (self.m - self.n))
        return self._flat(rows_topk(self._rows(importance), kept, self._valid))

    def spent(self, mask: Tensor) -> list[float]:
        return [float(mask.double().sum())]

    def next_cost(self, importance: Tensor, kept: Tensor) -> list[float]:
        return [0.0 if bool(kept.all()) else 1.0]

    def at_floor(self, importance: Tensor, kept: Tensor) -> set[str]:
        return set()

    def description(self) -> list[list[Any]]:
        return [[layer.name, list(layer.view_shape), [self.n, self.m]] for layer in self.layers]

    def _rows(self, values: Tensor) -> Tensor:
        """Values of the weights, `(num_blocks,)`, as groups `(rows, M)`; padded with zeros."""
        rows = []
        for layer, part in zip(self.layers, values.split(self.layer_sizes)):
            along = part.reshape(layer.view_shape).movedim(layer.input_axis, -1)
            rows.append(F.pad(along, (0, -along.shape[-1] % self.m)).reshape(-1, self.m))
        return torch.cat(rows)

    def _flat(self, rows: Tensor) -> Tensor:
        """The reverse of :meth:`_rows`."""
        flat, begin = [], 0
        for layer in self.layers:
            shape = list(layer.view_shape)
            inputs = shape.pop(layer.input_axis)
            length = -(-inputs // self.m)
            count = length * (layer.num_blocks // inputs)
            part = rows[begin : begin + count].reshape(*shape, length * self.m)[..., :inputs]
            flat.append(part.movedim(-1, layer.input_axis).reshape(-1))
            begin += count
        return torch.cat(flat)
