"""Best scores that hooks and schedulers remember: a dense network's are no measure of a pruned one.

Hooks that act on a validation (save the best checkpoint, stop early, lower the learning rate) hold
each score against the best so far. So a validation that only measures is kept from them, and what
they remember of the unpruned network is forgotten when the masks turn hard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.hooks import CheckpointHook, EarlyStoppingHook, ParamSchedulerHook
from mmengine.runner import Runner

_ACTING = (CheckpointHook, EarlyStoppingHook, ParamSchedulerHook)


@contextmanager
def only_measuring(runner: Runner) -> Iterator[None]:
    """Inside, a validation changes nothing: the hooks that act on its metrics sit out.

    A best checkpoint saved in the middle of an epoch could not be resumed.
    """
    hooks = runner._hooks
    runner._hooks = [hook for hook in hooks if not isinstance(hook, _ACTING)]
    try:
        yield
    finally:
        runner._hooks = hooks


def forget_best_scores(runner: Runner) -> None:
    """The next score is the best so far, whatever came before."""
    info = runner.message_hub.runtime_info
    for key in [key for key in info if key.startswith('best_score')]:
        info.pop(key)
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            hook.best_score = -float('inf') if hook.rule == 'greater' else float('inf')
            hook.wait_count = 0
    for scheduler in runner.param_schedulers or ():
        if getattr(scheduler, 'need_val_args', False):  # it waits for a plateau
            scheduler.best, scheduler.num_bad_epochs = scheduler.rule_worse, 0
