"""The masks of a model, as a state machine: search, harden, keep.

Two invariants carry everything here.

1. **The model stays the stock model.** No class, parameter, hook or state-dict key of it changes.
   Between two optimiser steps every masked parameter simply *holds* `w * f`, the weight that the
   network computes with; the weight `w` that the optimiser moves is kept aside. Deep copies, moving
   averages, checkpointed segments, layers used many times in a forward, DDP and mixed precision
   therefore see an ordinary network, and a state dict always gives back what was evaluated.
2. **Gradients of a step are gradients of what was masked.** `parameter.grad` is the gradient of
   `w * f`. Just before the optimiser steps, :meth:`BlockMasks.latent_weights` turns it into the
   gradients of `w` (times the mask) and of the importance m (the sum over each block of
   `w * grad`, through the closed-form Jacobian of the differentiable top-k).

A model is at any time in one of three states: `dense` (masks installed, weights untouched), `soft`
(the search: masks in (0, 1) that meet the budget) or `hard` (pruned weights are exactly zero, and
stay so). What the masks of the search are is up to a method, :mod:`mmsmart.methods`; all that is
said here holds for each of them, the budget of rivals' masks from their last cut on.

Source: SMART pruner, arXiv 2403.19969, Figure 1 and section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmsmart.blocks import BlockLayer, Excluded
from mmsmart.budget import Budget
from mmsmart.latency import LatencyTable
from mmsmart.methods import Method, Smart
from mmsmart.plans import Plan


class BlockMasks:
    """The importances of all blocks of a network, their budget, and the weights they silence.

    Args:
        plan: What the blocks are, what they cost, and which weights they silence.
        method: What decides the masks; SMART if not given.

    Attributes:
        plan: As given.
        method: As given.
        importance: m, float32 `(num_blocks,)`, a parameter for an optimiser of its own.
        state: 'dense', 'soft' or 'hard'.
        stock_keys: Keys of the model's state dict when the masks were installed.
        positions: Uses of each layer's weights by name, if MACs are budgeted.
        latency: Latencies of the layers, if there is a table.
    """

    def __init__(self, plan: Plan, method: Method | None = None) -> None:
        self.plan = plan
        self.method = Smart() if method is None else method
        self.importance = nn.Parameter(torch.zeros(plan.num_blocks))
        self.state = 'dense'
        self.stock_keys: frozenset[str] = frozenset()
        self.positions: dict[str, int] | None = None
        self.latency: LatencyTable | None = None
        self._latent: list[Tensor] = []  # soft only: w, while the parameters hold w * f
        self._first: np.ndarray | None = None  # hard mask of the first importance, in bits
        self._kept: Tensor | None = None  # hard only: the mask, bool
        # Hard only: every parameter with pruned weights, its key, and where it is pruned.
        self._pruned: list[tuple[str, nn.Parameter, Tensor]] = []

    @property
    def layers(self) -> list[BlockLayer]:
        """The layers whose blocks, or output channels, are pruned."""
        return self.plan.layers

    @property
    def excluded(self) -> list[Excluded]:
        """Weights that stay dense, with the reason."""
        return self.plan.excluded

    @property
    def temperature(self) -> float | None:
        """τ of the soft mask that is in the weights now, of a method that has one."""
        return getattr(self.method, 'temperature', None)

    @property
    def budgets(self) -> list[Budget]:
        """What may be kept, by part and resource."""
        return self.plan.budgets

    @property
    def resource(self) -> str:
        """What :attr:`budget` and its like count: that of the first of :attr:`budgets`."""
        return self.budgets[0].target.resource

    @property
    def unit(self) -> str:
        """What that is counted in."""
        return self.budgets[0].unit

    @property
    def sparsity(self) -> float:
        """Target share of the cost to remove."""
        if len(self._main) == 1:
            return self.budgets[0].target.sparsity
        return 1 - self.budget / self.total_cost

    @property
    def budget(self) -> float:
        """Cost that may be kept, over all parts."""
        return sum(self.budgets[i].amount for i in self._main)

    @property
    def total_cost(self) -> float:
        """Cost of all that is prunable, over all parts."""
        return sum(self.budgets[i].total for i in self._main)

    @property
    def _main(self) -> list[int]:
        """The budgets of all parts in :attr:`resource`."""
        return [i for i, x in enumerate(self.budgets) if x.target.resource == self.resource]

    @property
    def num_blocks(self) -> int:
        """N, the number of blocks over all layers."""
        return self.plan.num_blocks

    def begin(self, importance: Tensor, temperature: float | None = None) -> None:
        """Start the search: the first mask of this importance goes into the weights.

        Args:
            importance: First importance, `(num_blocks,)`.
            temperature: τ > 0 of the first soft mask; SMART needs it, its rivals have none.

        Raises:
            ValueError: If the importance has another shape or is not finite, or τ is not above 0.
            RuntimeError: If the search has begun before.
        """
        self._expect('dense', 'begin the search')
        if importance.shape != self.importance.shape or not bool(importance.isfinite().all()):
            raise ValueError(
                f'importance: expected {self.num_blocks} finite values, one a block, got shape '
                f'{tuple(importance.shape)}'
                + ('.' if importance.shape != self.importance.shape else ' with NaN or infinity.')
            )
        self._follow_model()
        self.importance.data = importance.detach().to(self._device, torch.float32).clone()
        if not self.method.one_shot:
            self.method.begin(self.plan, self.importance, temperature)
        self._first = _bits(self.hard_mask().bool())
        self._latent = self._exchange([torch.empty_like(w) for w in self.plan.weights])
        self.state = 'soft'
        if self.method.one_shot:
            self.harden()
        else:
            self._write_masked()

    @contextmanager
    def latent_weights(self, temperature: float | None = None) -> Iterator[None]:
        """Inside, the parameters are what an optimiser has to step: latent weights and gradients.

        Entering turns each gradient of a masked weight into that of its latent weight, and fills
        `importance.grad`. Leaving solves the budget for the moved importance and puts the new
        masked weights in place. Gradients stay with their parameters, scaled if they were scaled.
        In the dense state it does nothing; in the hard state pruned weights are put back to zero.

        Args:
            temperature: τ > 0 of the next soft mask; the present one if not given.
        """
        if self.state == 'soft':
            grads = [weight.grad for weight in self.plan.weights]
            grad_mask = self.plan.unmask(self._latent, grads, self.mask())
            masked = self._exchange(self._latent)
            self.method.backward(self.plan, self.importance, grad_mask)
            del grads, grad_mask  # the optimisers need the memory
            try:
                yield
            finally:
                self.method.advance(self.plan, self.importance, temperature)
                self._latent = self._exchange(masked)
                self._write_masked()
        elif self.state == 'hard':
            for _, weight, pruned in self._pruned:
                if weight.grad is not None:
                    weight.grad.masked_fill_(pruned, 0)
            try:
                yield
            finally:
                self.zero_pruned()
        else:
            yield

    def harden(self) -> None:
        """End the search: keep the blocks of largest importance, set the others to exactly zero.

        The kept cost is the most that fits the budget; see :func:`mmsmart.functional.hard_topk`.

        Raises:
            RuntimeError: If no search is going on.
        """
        self._expect('soft', 'harden the masks')
        kept = self.hard_mask().bool()
        for weight, latent in zip(self.plan.weights, self._latent):
            weight.data.copy_(latent)
        self.method.finish(self.plan, self.importance)
        self._fix(kept)
        self._latent, self.importance.grad, self.state = [], None, 'hard'
        self.zero_pruned()

    def mask(self) -> Tensor:
        """The mask that is in the weights now, float32 `(num_blocks,)`; ones while dense."""
        if self.state == 'dense':
            return torch.ones_like(self.importance.data)
        if self.state == 'hard':
            return self._kept.float()
        return self.method.mask(self.plan, self.importance.detach())

    def hard_mask(self) -> Tensor:
        """The mask that :meth:`harden` would set now, 0 or 1, float32 `(num_blocks,)`."""
        if self.state == 'hard':
            return self._kept.float()
        return self.plan.top(self._ranking())

    def _ranking(self) -> Tensor:
        return self.method.ranking(self.plan, self.importance.detach())

    def zero_pruned(self, model: nn.Module | None = None) -> None:
        """Set the pruned weights to exactly zero, in this model or in a copy of it.

        Args:
            model: A model with layers of the same names, such as a moving average.

        Raises:
            RuntimeError: If the masks are not hard yet.
        """
        self._expect('hard', 'zero pruned weights')
        for key, weight, pruned in self._pruned:
            weight = weight if model is None else model.get_parameter(key)
            weight.data.masked_fill_(pruned.to(weight.device), 0)

    def kept_cost(self) -> float:
        """Cost of the blocks that :meth:`hard_mask` keeps."""
        spent = self.plan.spent(self.hard_mask())
        return sum(spent[i] for i in self._main)

    def next_block_cost(self) -> float:
        """Cost of the most important pruned block: it is more than what is left of the budget.

        The largest over all parts.
        """
        following = self.next_block_costs()
        return max(following[i] for i in self._main)

    def kept_costs(self) -> list[float]:
        """What :meth:`hard_mask` spends of each of :attr:`budgets`."""
        return self.plan.spent(self.hard_mask())

    def next_block_costs(self) -> list[float]:
        """What the most important pruned block of each part would add to each of them."""
        return self.plan.next_cost(self._ranking(), self.hard_mask())

    def at_floor(self) -> set[str]:
        """Names of the layers (of coupled channels, groups) that keep just what they must."""
        return self.plan.at_floor(self._ranking(), self.hard_mask())

    def soft_sparsity(self) -> float:
        """Share of the cost that the present mask removes."""
        spent = self.plan.spent(self.mask())
        return 1 - sum(spent[i] for i in self._main) / self.total_cost

    def undecided(self, margin: float = 0.05) -> float:
        """Share of blocks whose mask is neither within `margin` of 0 nor of 1."""
        mask = self.mask()
        return float(((mask > margin) & (mask < 1 - margin)).float().mean())

    def moved(self) -> float:
        """Share of blocks that are on the other side of the budget than at the search's start."""
        if self._first is None:
            return 0.0
        moved = np.unpackbits(_bits(self.hard_mask().bool()) ^ self._first)
        return int(moved.sum()) / self.num_blocks

    def state_dict(self) -> dict[str, Any]:
        """Everything a later process needs to go on bit for bit; tensors, numbers, names only."""
        return {
            'state': self.state,
            'layers': self.plan.description(),
            'budgets': [[*astuple(x.target), x.amount] for x in self.budgets],
            'importance': self.importance.detach().clone(),
            'method': str(self.method),
            'method_state': self.method.state_dict(),
            'mask': self.mask() if self.state == 'soft' else None,
            'latent': [weight.clone() for weight in self._latent],
            'first': None if self._first is None else _flags(self._first, self.num_blocks),
            'kept': self._kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the weights must have been loaded before.

        Raises:
            ValueError: If it was taken from other layers, blocks or another budget.
        """
        self._expect('dense', 'load masks')
        own = self.state_dict()
        for key in ('layers', 'budgets', 'method'):
            mine = own[key]
            if state[key] != mine:
                raise ValueError(
                    f'masks: the checkpoint was made with other {key} than this model has '
                    f'({_first_difference(state[key], mine)}). Resume with the same `sparsity`, '
                    '`block`, `layers` and `method`, or start anew from its weights with '
                    '`load_from`.'
                )
        self._follow_model()

        def here(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self._device, copy=True)

        self.importance.data = here(state['importance'])
        self.state, first = state['state'], state['first']
        self._first = None if first is None else _bits(first)
        self.method.load_state_dict(state['method_state'], self._device)
        if self.state == 'soft':
            self._latent = [here(latent) for latent in state['latent']]
            self._write_masked()
        elif self.state == 'hard':
            self._fix(here(state['kept']))
            self.zero_pruned()

    @property
    def _device(self) -> torch.device:
        return self.plan.layers[0].weight.device

    def _follow_model(self) -> None:
        # The masks may have been installed before the model moved to its device.
        self.plan.follow(self._device)
        self.importance.data = self.importance.data.to(self._device)

    def _fix(self, kept: Tensor) -> None:
        self._kept = kept
        self._pruned = self.plan.pruned(kept)

    def _exchange(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Make the parameters hold these tensors; gives back those that they held."""
        parameters = self.plan.weights
        held = [parameter.data for parameter in parameters]
        for parameter, weight in zip(parameters, weights):
            parameter.data = weight.data
        return held

    def _write_masked(self) -> None:
        weights = [weight.data for weight in self.plan.weights]
        self.plan.scale(self._latent, self.mask(), out=weights)

    def _expect(self, state: str, action: str) -> None:
        if self.state != state:
            raise RuntimeError(f'cannot {action}: the masks are {self.state}, not {state}.')


def _bits(flags: Tensor) -> np.ndarray:
    """Flags, bool `(n,)`, eight a byte."""
    return np.packbits(flags.cpu().numpy())


def _flags(bits: np.ndarray, n: int) -> Tensor:
    """The reverse of :func:`_bits`."""
    return torch.from_numpy(np.unpackbits(bits, count=n)).bool()


def _first_difference(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, list) and isinstance(mine, list):
        for other, own in zip(theirs, mine):
            if other != own:
                return f'{other} there, {own} here'
        return f'{len(theirs)} there, {len(mine)} here'
    return f'{theirs} there, {mine} here'
