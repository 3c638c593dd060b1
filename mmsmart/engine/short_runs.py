"""Short runs of a config inside the process of a long one, which they leave as they found it."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import ParamSchedulerHook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from mmsmart.engine.random_state import preserved_random_state
from mmsmart.registry import HOOKS

# Of hooks of the config: numbers of epochs or iterations, which shrink with the run.
_LENGTHS = ('num_last_epochs', 'switch_epoch', 'switch_iter', 'begin_epoch', 'begin_iter')
_ROUNDING = 1e-9


@HOOKS.register_module()
class FasterSchedule(ParamSchedulerHook):
    """Runs through the schedulers of a longer run: they step `speed` times as often.

    Args:
        speed: Length of the longer run over that of this one, 1 or more.
    """

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        for _ in range(self._steps(runner.iter)):
            super().after_train_iter(runner, *args, **kwargs)

    def after_train_epoch(self, runner: Runner) -> None:
        for _ in range(self._steps(runner.epoch)):
            super().after_train_epoch(runner)

    def _steps(self, done: int) -> int:
        """Steps after the epoch or iteration that follows so many."""
        return self._due(done + 1) - self._due(done)

    def _due(self, done: int) -> int:
        return math.floor(done * self.speed + _ROUNDING)


def lengths(config: Config, share: float) -> tuple[int, int]:
    """Length of the run of a config, and of a share of it, in the epochs or iterations it counts.

    Raises:
        ValueError: If the share is less than one.
    """
    train = config.get('train_cfg') or {}
    unit = 'max_epochs' if train.get('max_epochs') else 'max_iters'
    full = train.get(unit) or 0
    short = int(full * share + _ROUNDING)
    if short < 1:
        raise ValueError(
            f'share: {share:g} of train_cfg.{unit} = {full} is less than one. Raise the share, or '
            'train longer.'
        )
    return full, short


def shortened(config: Config, share: float) -> Config:
    """The config of the same run at a share of its length.

    Learning rates fall over it as over the whole run. It is validated at its end, keeps no best
    checkpoint, and logs to files alone.
    """
    config = copy.deepcopy(config)
    full, short = lengths(config, share)
    train = config.train_cfg
    train['max_epochs' if train.get('max_epochs') else 'max_iters'] = short
    train['val_interval'] = short
    for key in ('dynamic_intervals', 'val_begin'):
        train.pop(key, None)
    hooks = config.get('default_hooks') or {}
    if hooks.get('param_scheduler', {}) is not None:
        hooks['param_scheduler'] = dict(type='mmsmart.FasterSchedule', speed=full / short)
    if hooks.get('checkpoint'):
        hooks['checkpoint'] = {**hooks['checkpoint'], 'save_best': None, 'rule': None}
    config.default_hooks = hooks
    for hook in config.get('custom_hooks') or []:
        for key in _LENGTHS:
            if isinstance(hook, dict) and isinstance(hook.get(key), int):
                hook[key] = round(hook[key] * short / full)
    if config.get('visualizer'):
        config.visualizer['vis_backends'] = [dict(type='LocalVisBackend')]
    return config


@contextmanager
def short_run(kind: type[Runner], config: Config, whole: Config) -> Iterator[Runner]:
    """Inside, a runner of its own; afterwards MMEngine's global instances are those from before.

    Nothing that is drawn inside leaves a trace in the random generators.

    Args:
        kind: Class of the runner.
        config: What :func:`shortened` made of `whole`, with a `work_dir` and an `experiment_name`
            that no other runner has.
        whole: The config of the whole run.
    """
    with preserved_random_state():
        runner = kind.from_cfg(config)
        try:
            full, short = lengths(whole, 1.0)[0], lengths(config, 1.0)[0]
            # Schedulers that name no end last as long as the whole run.
            ends = {True: full, False: round(runner.max_iters * full / short)}
            _end(runner.param_schedulers, ends)
            yield runner
        finally:
            _close(runner)


def _end(schedulers: Any, ends: dict[bool, int]) -> None:
    if isinstance(schedulers, dict) and 'type' in schedulers:
        schedulers.setdefault('end', ends[bool(schedulers.get('by_epoch', True))])
    elif isinstance(schedulers, (dict, list, tuple)):
        for each in schedulers.values() if isinstance(schedulers, dict) else schedulers:
            _end(each, ends)


def _close(runner: Runner) -> None:
    for handler in list(runner.logger.handlers):
        if getattr(handler, 'baseFilename', None):
            handler.close()
            runner.logger.removeHandler(handler)
    # The current instance of each kind is the one that was made last.
    for kind in (MMLogger, MessageHub, DefaultScope, Visualizer, type(runner.visualizer)):
        kind._instance_dict.pop(runner.experiment_name, None)
    vars(runner).clear()  # whoever still holds the runner, no longer holds its model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
