"""Runs in processes of their own, some at a time; one that fails is a record and not the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mmsmart.compare.folder import BEGUN, DONE, FAILED, JobFolder
from mmsmart.compare.grid import Job

STARTED, HELD = 'started', 'held'
_PATIENCE = 10.0  # seconds for a process to end by itself


@dataclass
class _Run:
    folder: JobFolder
    process: subprocess.Popen[bytes]
    lock: IO[str]
    slot: int
    started: float


def run_jobs(
    jobs: Sequence[Job],
    root: str | Path,
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    check: Callable[[Job], None] = lambda job: None,
) -> Iterator[tuple[Job, str, dict[str, Any]]]:
    """Run jobs in this order, each as soon as its dense network is there; yields what happens.

    Yields a job, 'started', 'held' (by another process, waited for), 'done' or 'failed', and its
    record. Closing the generator ends what still runs; it can be gone on with.

    Args:
        jobs: What is run, the dense runs that others need among it.
        root: Where their folders are.
        command: What trains a config: `{config}` in it becomes its path, which else comes last;
            `--work-dir` follows and, to go on with a run, `--resume`.
        environments: Variables of each run at a time, so as many runs at a time.
        check: Raises ValueError for a result that can't be used.

    Raises:
        ValueError: If there is no such command, or runs can't be held in `root`.
    """
    if not command or shutil.which(command[0]) is None:
        raise ValueError(
            f'command: expected a program and its arguments, got {" ".join(command)!r}, which '
            'begins with none. Give the path of one, or a name that PATH leads to.'
        )
    waiting, running, free = list(jobs), [], list(range(len(environments)))
    before = {job.name: JobFolder(root, job).record() for job in jobs}
    failed: set[str] = set()
    held: set[str] = set()
    try:
        while waiting or running:
            unfinished = {job.name for job in [*waiting, *(run.folder.job for run in running)]}
            for job in list(waiting):
                if not free:
                    break
                if job.dense is not None and job.dense.name in unfinished:
                    continue
                folder = JobFolder(root, job)
                lock = folder.lock()
                if lock is None:
                    if job.name not in held:
                        held.add(job.name)
                        yield job, HELD, {}
                    continue
                waiting.remove(job)
                state, record = folder.state(), folder.record()
                if state == DONE or (state == FAILED and record != before[job.name]):
                    lock.close()  # another process has run it meanwhile
                    if state == FAILED:
                        failed.add(job.name)
                    yield job, state, record
                    continue
                try:
                    if job.dense is not None and job.dense.name in failed:
                        raise FileNotFoundError(f'{job.dense.name} failed, so it was not run.')
                    run = _start(folder, lock, command, free[0], environments[free[0]])
                except (OSError, ValueError) as error:
                    failed.add(job.name)
                    yield job, FAILED, _failed_before(folder, error)
                    lock.close()
                    continue
                running.append(run)
                free.pop(0)
                yield job, STARTED, folder.record()
            time.sleep(0.1 if running else 1.0 if waiting else 0.0)
            for run in list(running):
                if run.process.poll() is None:
                    continue
                running.remove(run)
                free = sorted([*free, run.slot])
                record = _ended(run, check)
                if record['state'] == FAILED:
                    failed.add(run.folder.job.name)
                yield run.folder.job, record['state'], record
    finally:
        _stop(running)


def environments(jobs: int | None, gpus: Sequence[str], gpus_per_job: int) -> list[dict[str, str]]:
    """Variables for so many runs at a time: each has GPUs or cores of its own.

    `PORT`, of tools/dist_train.sh, counts up from the user's; without one each run finds its own.

    Args:
        jobs: How many; if None, as many as there are groups of GPUs, or cores, at most 8.
        gpus: Names of the visible GPUs; runs share them in turn if there are more runs.
        gpus_per_job: How many GPUs a run sees.

    Raises:
        ValueError: If there are not so many GPUs, or PORT is no number.
    """
    cores = len(os.sched_getaffinity(0))
    if gpus and len(gpus) < gpus_per_job:
        raise ValueError(f'gpus-per-job: {gpus_per_job} asked for, and {len(gpus)} are visible.')
    groups = [
        ','.join(gpus[i : i + gpus_per_job])
        for i in range(0, len(gpus) - gpus_per_job + 1, gpus_per_job)
    ]
    count = jobs or len(groups) or min(cores, 8)
    port = os.environ.get('PORT')
    if port and not port.isdecimal():
        raise ValueError(
            f'PORT: expected a number such as 29500, got {port!r}. Set one, or leave it unset.'
        )
    variables = []
    for slot in range(count):
        slots = {'PORT': str(int(port) + slot)} if port else {}
        if groups:
            slots['CUDA_VISIBLE_DEVICES'] = groups[slot % len(groups)]
        elif 'OMP_NUM_THREADS' not in os.environ:
            slots['OMP_NUM_THREADS'] = str(max(cores // count, 1))
        variables.append(slots)
    return variables


def visible_gpus() -> list[str]:
    """Names of the GPUs that a run may use, as CUDA_VISIBLE_DEVICES has them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get('CUDA_VISIBLE_DEVICES')
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(',') if name.strip()]


def command_of(folder: JobFolder, command: Sequence[str], resume: bool) -> list[str]:
    """What is run, as it can be typed."""
    config = str(folder.config)
    words = [word.replace('{config}', config) for word in command]
    if not any('{config}' in word for word in command):
        words.append(config)
    words += ['--work-dir', str(folder.path)]
    # mmseg's train.py would resume from `load_from`.
    return [*words, '--resume', '--cfg-options', 'load_from=None'] if resume else words


def _start(
    folder: JobFolder, lock: IO[str], command: Sequence[str], slot: int, variables: dict[str, str]
) -> _Run:
    words = command_of(folder, command, folder.prepare())
    folder.note(command=words)
    with folder.log.open('ab') as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONUNBUFFERED': '1', 'PORT': _free_port(), **variables},
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C is for us to hand on, to all that it started
        )
    return _Run(folder, process, lock, slot, time.monotonic())


def _free_port() -> str:
    """One that no process listens on, whoever started it."""
    with socket.create_server(('', 0)) as server:
        return str(server.getsockname()[1])


def _ended(run: _Run, check: Callable[[Job], None]) -> dict[str, Any]:
    folder, code = run.folder, run.process.returncode
    _kill(run.process, signal.SIGKILL)  # what it may have left behind
    reason = f'ended with exit code {code}' if code else None
    if not code:
        folder.note(state=DONE)
        try:
            if folder.state() != DONE:
                missing = 'pruning.json' if folder.job.method else 'checkpoint'
                raise ValueError(f'ended without a {missing}')
            check(folder.job)
        except ValueError as error:
            reason = str(error)
    seconds = time.monotonic() - run.started
    if reason is None:
        record = folder.note_end(DONE, seconds)
    else:
        record = folder.note_end(FAILED, seconds, reason=reason, log=folder.last_lines())
    run.lock.close()
    return record


def _failed_before(folder: JobFolder, error: Exception) -> dict[str, Any]:
    """What is told of a job that could not be started.

    Its folder does not say so: the next start is to go on where this one would have.
    """
    return {**folder.record(), 'state': FAILED, 'reason': str(error), 'log': []}


def _stop(running: Sequence[_Run]) -> None:
    for run in running:
        _kill(run.process, signal.SIGTERM)
    until = time.monotonic() + _PATIENCE
    for run in running:
        try:
            run.process.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            print(f'{run.folder.job.name} did not end and is killed.', file=sys.stderr)
        _kill(run.process, signal.SIGKILL)
        run.process.wait()
        run.folder.note_end(BEGUN, time.monotonic() - run.started)
        run.lock.close()


def _kill(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process and all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
