"""Training in the memory layout in which convolutions are fastest."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsmart.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keeps convolution weights channels-last while training, and puts them back at its end.

    On CPUs in bfloat16, and on GPUs with tensor cores, convolutions then need no conversions.
    Results differ from those without it by rounding alone.

    Example:
        >>> custom_hooks = [dict(type='mmsmart.ChannelsLastHook')]
    """

    # Back before SmartPruningHook writes its files.
    priority = 'HIGH'

    def before_train(self, runner: Runner) -> None:
        runner.model.to(memory_format=torch.channels_last)

    def after_train(self, runner: Runner) -> None:
        runner.model.to(memory_format=torch.contiguous_format)
