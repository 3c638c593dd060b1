"""The settings of a comparison's runs, checked as a run would check them when it starts."""

from __future__ import annotations

from collections.abc import Iterable

from mmsmart.compare import Job
from mmsmart.engine.config import Smart, build
from mmsmart.engine.pruning_hook import SmartPruningHook


def expect_valid(jobs: Iterable[Job]) -> None:
    """Refuse what `smart` can't be, before anything runs.

    Raises:
        ValueError: Naming the method, the key, what it holds and what is allowed.
    """
    for job in jobs:
        if job.method is None:
            continue
        try:
            smart = build(Smart, 'smart', job.options['smart'])
            SmartPruningHook(**smart.hook_args())
            smart.optimizer_args()
        except (ValueError, TypeError) as error:
            raise ValueError(f'methods.{job.method}: {error}') from error
