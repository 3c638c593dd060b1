"""The settings of a comparison's runs, checked as a run would check them when it starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmsmart.compare import Job, found
from mmsmart.engine.runner import expect_pruning
from mmsmart.engine.stock_tools import enable_inheritance

_OPTIONS = 'options_of_all_runs'


def expect_valid(jobs: Iterable[Job]) -> None:
    """Refuse what `smart` can't be beside all that the task's config says, before anything runs.

    Raises:
        ValueError: Naming the task, the method, the block, the key, what it holds and what is
            allowed; or a config that can't be read.
    """
    by_config: dict[str, list[Job]] = {}
    for job in jobs:
        by_config.setdefault(job.config, []).append(job)
    for mine in by_config.values():
        config = _read(mine)
        for job, options in zip(mine, config.pop(_OPTIONS)):
            try:
                merged = Config._merge_a_into_b(options, config)
                if job.method is not None:
                    expect_pruning(merged)
            except (ValueError, TypeError) as error:
                raise ValueError(f'{_place(job)}: {error}') from error


def _read(jobs: Sequence[Job]) -> dict[str, Any]:
    """The config that these jobs inherit from, and the options of all of them as it reads them.

    It takes a tenth of a second to read, so it is read once.
    """
    first = jobs[0]
    enable_inheritance()
    with TemporaryDirectory() as folder:
        file = Path(folder) / 'runs.py'
        options = [job.options for job in jobs]
        file.write_text(f'_base_ = [{str(found(first.config))!r}]\n{_OPTIONS} = {options!r}\n')
        try:
            with _quiet():
                return dict(Config.fromfile(file, import_custom_modules=False)._cfg_dict)
        except Exception as error:  # a config is code, and can fail of anything
            key = 'dense' if first.method is None else 'config'
            raise ValueError(
                f'tasks.{first.task}.{key}: {first.config} can not be read: '
                f'{type(error).__name__}: {error}'
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, MMEngine does not tell of every environment variable that a config names."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _place(job: Job) -> str:
    if job.method is None:
        return f'tasks.{job.task}.dense_options'
    return f'tasks.{job.task}, methods.{job.method}, block {job.block}'
