"""Optimiser wrappers that step masked weights and their importance.

They are MMEngine's own wrappers around :meth:`mmsmart.BlockMasks.latent_weights`: inside a step the
optimiser finds latent weights and their gradients (so clipping, weight decay and momentum mean what
they always mean), outside of it the network computes with masked weights. The importance has an
optimiser of its own, without weight decay and untouched by the learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.optim.optimizer.amp_optimizer_wrapper import GradScaler
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from mmsmart.engine.config import ImportanceOptimizer, build
from mmsmart.engine.distillation import Teacher
from mmsmart.engine.processes import same_everywhere
from mmsmart.masking import BlockMasks
from mmsmart.registry import OPTIM_WRAPPERS


class MaskedStep:
    """What both wrappers share; comes before the MMEngine wrapper among the base classes.

    Args:
        importance: `dict(lr=0.01, optimizer=dict(type='Adam'))`, the optimiser of the importance.
        kwargs: Arguments of the MMEngine wrapper.
    """

    def __init__(self, *args: Any, importance: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._importance_settings = build(ImportanceOptimizer, 'smart.importance', importance)
        self.masks: BlockMasks | None = None
        self.importance_optimizer: torch.optim.Optimizer | None = None
        self.temperature: float | None = None
        self.distillation: Teacher | None = None

    def attach(self, masks: BlockMasks, distillation: Teacher | None = None) -> None:
        """Take over the masks of the model whose parameters the optimiser holds.

        Args:
            masks: The masks.
            distillation: What adds the distance from the dense network to the loss, if anything.
        """
        self.masks, self.distillation = masks, distillation
        self.importance_optimizer = OPTIMIZERS.build(
            dict(
                **self._importance_settings.optimizer,
                params=[masks.importance],
                lr=self._importance_settings.lr,
            )
        )
        for group in self.importance_optimizer.param_groups:
            if 'weight_decay' in group:
                group['weight_decay'] = 0.0  # AdamW and others decay unless told not to

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """MMEngine's, inside which the model is compared with the dense one."""
        with super().optim_context(model):
            if self.distillation is None:
                yield
            else:
                with self.distillation.compared():
                    yield

    def update_params(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """MMEngine's, for the loss and the distance from the dense network."""
        if self.distillation is not None and self.distillation.begun:
            distance = self.distillation.distance()
            self.message_hub.update_scalar('train/distillation', distance.detach())
            loss = loss + self.distillation.weight * distance
        super().update_params(loss, *args, **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Step latent weights and importance, then put masks at `self.temperature` in place."""
        if self._attached().state == 'soft':
            self._expect_finite()
        with self.masks.latent_weights(self.temperature):
            self._step_importance()
            if self._importance_learns:
                same_everywhere(self.masks.importance.data)
            super().step(**kwargs)
        if self.masks.state == 'soft' and self.masks.method.restarted:
            self.optimizer.state.clear()

    def zero_grad(self, **kwargs: Any) -> None:
        """MMEngine's; the importance's gradient, too, takes no memory between steps."""
        super().zero_grad(**kwargs)
        if self.importance_optimizer is not None:
            self.importance_optimizer.zero_grad()

    @property
    def _importance_learns(self) -> bool:
        return self.masks.state == 'soft' and self.masks.method.learns

    def _step_importance(self) -> None:
        if self._importance_learns:
            self.importance_optimizer.step()

    def _expect_finite(self) -> None:
        if not bool(self._sum_of_gradients().isfinite()):
            raise FloatingPointError(
                'loss: its gradient is NaN or infinite in the search, so nothing was stepped and '
                'the checkpoints are sound. Likely causes: (a) a learning rate that is too high, '
                '(b) a broken image or label, (c) half precision without loss scaling. Mend it and '
                'go on with --resume.'
            )

    def _sum_of_gradients(self) -> Tensor:
        """A scalar that is finite if every gradient of the optimiser's parameters is."""
        parameters = [p for group in self.optimizer.param_groups for p in group['params']]
        gradients = [p.grad.sum() for p in parameters if p.grad is not None]
        return sum(gradients, start=torch.zeros(()))

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser, of the importance's optimiser and of the masks."""
        state = super().state_dict()
        if self.masks is not None:
            state['smart'] = {
                'masks': self.masks.state_dict(),
                'importance_optimizer': self.importance_optimizer.state_dict(),
            }
            if self.distillation is not None:
                state['smart']['distillation'] = self.distillation.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load :meth:`state_dict`; one without masks is that of a dense run."""
        state_dict = dict(state_dict)
        smart = state_dict.pop('smart', None)
        super().load_state_dict(state_dict)
        if smart is not None:
            self._attached().load_state_dict(smart['masks'])
            if self.distillation is not None or 'distillation' in smart:
                self._load_distillation(smart.get('distillation'))
            self.importance_optimizer.load_state_dict(smart['importance_optimizer'])

    def _load_distillation(self, state: dict[str, Tensor] | None) -> None:
        if self.distillation is None or (state is None and self.masks.state != 'dense'):
            there, here = ('without', 'with') if state is None else ('with', 'without')
            raise ValueError(
                f'resume: the checkpoint is of a run {there} smart.distillation, and this one is '
                f'{here} it. Resume with the same smart.distillation, or start anew from its '
                'weights with `load_from`.'
            )
        try:
            self.distillation.load_state_dict(state or {})
        except RuntimeError as error:
            raise ValueError(
                'resume: the checkpoint is of a run with another smart.distillation.of, or of '
                'another model. Resume with the same, or start anew from its weights with '
                '`load_from`.'
            ) from error

    def _attached(self) -> BlockMasks:
        if self.masks is None:
            raise RuntimeError(
                f'{type(self).__name__} has no masks to train. Add '
                "dict(type='mmsmart.SmartPruningHook') to `custom_hooks`, or the base file "
                '`_base_/smart.py` to `_base_`.'
            )
        return self.masks


@OPTIM_WRAPPERS.register_module()
class SmartOptimWrapper(MaskedStep, OptimWrapper):
    """`OptimWrapper` for a model with block masks; see :class:`MaskedStep`."""


class _AmpOptimWrapper(AmpOptimWrapper):
    """MMEngine's, which also takes `dtype='bfloat16'` where there is no accelerator."""

    def __init__(self, *args: Any, dtype: str | torch.dtype | None = None, **kwargs: Any) -> None:
        if get_device() != 'cpu' or dtype not in ('bfloat16', torch.bfloat16):
            super().__init__(*args, dtype=dtype, **kwargs)
            return
        kwargs = {key: x for key, x in kwargs.items() if key not in ('loss_scale', 'use_fsdp')}
        super(AmpOptimWrapper, self).__init__(*args, **kwargs)
        self.loss_scaler = GradScaler(enabled=False)
        self._scale_update_param, self.cast_dtype = None, torch.bfloat16


@OPTIM_WRAPPERS.register_module()
class SmartAmpOptimWrapper(MaskedStep, _AmpOptimWrapper):
    """`AmpOptimWrapper` for a model with block masks; see :class:`MaskedStep`.

    Masks, importance and budget stay in float32 and float64. An iteration whose scaled gradients
    overflow steps neither the weights nor the importance.

    Unlike MMEngine's it also runs without an accelerator, if `dtype='bfloat16'` asks for what CPUs
    can do; bfloat16 has the range of float32 and needs no loss scaling.
    """

    def _expect_finite(self) -> None:
        if not self.loss_scaler.is_enabled():  # it leaves out a step whose gradients overflow
            super()._expect_finite()

    def _step_importance(self) -> None:
        if self._importance_learns:
            # The scaler judges each optimiser by its own gradients. 0 times an overflow is NaN, so
            # one in any part of the network holds the importance back too.
            self.masks.importance.grad += 0 * self._sum_of_gradients()
            self.loss_scaler.step(self.importance_optimizer)
