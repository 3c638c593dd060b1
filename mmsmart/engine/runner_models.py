"""The networks inside a runner: the one that is trained, and the one that validation scores."""

from __future__ import annotations

from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn


def trained_model(runner: Runner) -> nn.Module:
    """The network whose weights are trained, without what distributes it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def evaluated_model(runner: Runner) -> nn.Module:
    """The network that validation scores: the moving average where there is one.

    mmpretrain's can be told to leave the average out of it.
    """
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and getattr(hook, 'evaluate_on_ema', True):
            return hook.ema_model.module
    return trained_model(runner)
