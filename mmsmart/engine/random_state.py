"""The random generators of a process, kept in checkpoints so that a resumed run is the same run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.runner import IterBasedTrainLoop, Runner


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators; loads with `weights_only=True`.

    Of several GPUs, this is that of the current one, which is all that a process draws from.
    """
    name, keys, *rest = np.random.get_state()
    state = {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators back to where :func:`random_state` found them."""
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """What is drawn inside leaves no trace outside."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


class ResumableRandomness:
    """Random numbers of a training that go on after a resume as if it had never stopped.

    The generators' state goes into each checkpoint and is put back before the first batch is
    loaded. Validation leaves no trace in it: a run that is resumed after one does not repeat it.
    """

    def __init__(self) -> None:
        self._outside: dict[str, Any] | None = None  # while a validation is going on
        self._resumed: dict[str, Any] | None = None  # until the first batch is there

    def save_to(self, checkpoint: dict[str, Any]) -> None:
        """Add the state that training will go on with."""
        checkpoint['random_state'] = self._outside or random_state()

    def load_from(self, checkpoint: dict[str, Any], runner: Runner) -> None:
        """Take the state out of the checkpoint of a resumed run."""
        # The first process wrote it; the others draw the same numbers unless told otherwise.
        if not (get_rank() and runner._randomness_cfg.get('diff_rank_seed')):
            self._resumed = checkpoint.get('random_state')

    def before_epoch(self, runner: Runner) -> None:
        """Put back what was resumed, before the epoch's batches are drawn."""
        if self._resumed is None:
            return
        set_random_state(self._resumed)
        loader = runner.train_dataloader
        if isinstance(runner.train_loop, IterBasedTrainLoop) or loader.persistent_workers:
            # The uninterrupted run went on with the data iterator that it had. Making one anew
            # draws a number, which must not come out of the generator that was just put back.
            loader.generator = torch.Generator()

    def before_iter(self, runner: Runner) -> None:
        """The first batch is there: the loader draws from the common generator again."""
        if self._resumed is not None:
            runner.train_dataloader.generator = self._resumed = None

    def before_validation(self) -> None:
        self._outside = random_state()

    def after_validation(self) -> None:
        if self._outside is not None:
            set_random_state(self._outside)
            self._outside = None
