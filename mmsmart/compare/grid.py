"""The runs of a suite, in the order in which they are made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmsmart.compare.suite import Method, Suite, Task, block_name, folder_of, found, merge


@dataclass(frozen=True)
class Job:
    """One run: of the dense network, which has no `method`, or of a method in a cell of the grid.

    Args:
        name: Its folder, such as 'resnet14/smart/8x8/0.9/seed0'.
        task: Name of the task.
        seed: Of the run.
        config: The config that it inherits from, as the suite has it.
        options: What differs from the config, dictionaries inside dictionaries.
        metric: Which counts.
        method: Label of the method.
        block: Its name.
        sparsity: What is asked for.
        checkpoint: The weights that it starts from, as the suite has them.
        dense: The job that makes them.
    """

    name: str
    task: str
    seed: int
    config: str
    options: dict[str, Any] = field(repr=False)
    metric: str
    method: str | None = None
    block: str | None = None
    sparsity: float | None = None
    checkpoint: str | None = None
    dense: Job | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes its result what it is; a result of other settings doesn't count."""
        settings = {
            'config': self.config,
            'options': self.options,
            'checkpoint': self.checkpoint,
            'dense': self.dense.settings if self.dense else None,
        }
        return json.loads(json.dumps(settings))


def jobs_of(suite: Suite) -> list[Job]:
    """All runs of a suite: seed after seed, of each the dense networks first.

    Inside a seed the methods take turns cell by cell, so that what is there can be compared.
    """
    seeds = list(dict.fromkeys(seed for task in suite.tasks.values() for seed in task.seeds))
    jobs = []
    for seed in seeds:
        tasks = {name: task for name, task in suite.tasks.items() if seed in task.seeds}
        dense = {name: _dense_job(name, task, seed) for name, task in tasks.items()}
        jobs += [job for job in dense.values() if job is not None]
        for name, task in tasks.items():
            jobs += _pruning_jobs(suite, name, task, seed, dense[name])
    return jobs


def selected(jobs: Sequence[Job], patterns: Sequence[str]) -> list[Job]:
    """Those whose name one of the shell patterns matches, with the dense runs that they need.

    Raises:
        ValueError: If a pattern matches none.
    """
    names: set[str] = set()
    for pattern in patterns:
        matching = [job for job in jobs if fnmatchcase(job.name, pattern)]
        if not matching:
            raise ValueError(f'only: no run matches {pattern!r}; the first one is {jobs[0].name}.')
        names |= {job.name for job in matching}
        names |= {job.dense.name for job in matching if job.dense}
    return [job for job in jobs if job.name in names]


def config_text(job: Job, file: Path, load_from: str | None) -> str:
    """The config of a run, as it stands in `file`: the suite's config and what differs from it."""
    options = job.options if load_from is None else {**job.options, 'load_from': load_from}
    base = os.path.relpath(found(job.config), file.parent.resolve())
    lines = [f'# {job.name}', f'_base_ = [{base!r}]']
    lines += [f'{key} = {_written(value)}' for key, value in options.items()]
    return '\n'.join(lines) + '\n'


def _dense_job(name: str, task: Task, seed: int) -> Job | None:
    if task.dense is None or task.checkpoint is not None:
        return None
    options = merge(task.dense_options, {'randomness': {'seed': seed}})
    return Job(f'{folder_of(name)}/dense/seed{seed}', name, seed, task.dense, options, task.metric)


def _pruning_jobs(
    suite: Suite, name: str, task: Task, seed: int, dense: Job | None
) -> Iterator[Job]:
    checkpoint = task.checkpoint and task.checkpoint.replace('{seed}', str(seed))
    for block in task.blocks:
        for sparsity in task.sparsities:
            for label, method in suite.methods.items():
                folders = map(folder_of, (name, label, block, sparsity))
                yield Job(
                    name='/'.join([*folders, f'seed{seed}']),
                    task=name,
                    seed=seed,
                    config=task.config,
                    options=_pruning_options(task, method, block, sparsity, seed),
                    metric=task.metric,
                    method=label,
                    block=block_name(block),
                    sparsity=sparsity,
                    checkpoint=checkpoint,
                    dense=dense,
                )


def _pruning_options(
    task: Task, method: Method, block: str | Sequence[int], sparsity: float, seed: int
) -> dict[str, Any]:
    options = merge(merge(task.options, method.options), {'smart': method.smart})
    cell = {'smart': {'sparsity': sparsity, 'block': block}, 'randomness': {'seed': seed}}
    return merge(options, cell)


def _written(value: Any, indent: str = '') -> str:
    if not isinstance(value, dict) or not value:
        return repr(value)
    inner = f'{indent}    '
    lines = [f'{inner}{key!r}: {_written(item, inner)},' for key, item in value.items()]
    return '\n'.join(['{', *lines, f'{indent}}}'])
