"""Trials of models in processes of their own, so that a crash is a row and not the end."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mmsmart.engine.sweep.stock_models import PACKAGES, StockModel, configs_of
from mmsmart.engine.sweep.trial import blank_row, try_model


@dataclass
class _Trial:
    model: StockModel
    process: BaseProcess
    messages: connection.Connection
    started: float
    deadline: float
    part: str = 'stock'

    def failed(self, reason: str) -> dict[str, Any]:
        self.process.kill()
        return {
            **blank_row(self.model),
            'outcome': f'{self.part} fails',
            'reason': reason,
            'seconds': round(time.monotonic() - self.started, 2),
        }


def tried(
    models: Sequence[StockModel],
    jobs: int,
    timeout: float,
    memory: float,
    trial: Callable[[StockModel, Callable[[str], None]], dict[str, Any]] = try_model,
) -> Iterator[dict[str, Any]]:
    """Rows of these models as they come; a model that crashes or hangs is a row like any other.

    Args:
        models: What is tried, in this order.
        jobs: Number of processes at a time.
        timeout: Seconds for the stock part; the pruned part may take three times as many.
        memory: GB that a process may take for its model.
        trial: What runs in the process; takes the arguments of :func:`try_model`.
    """
    context = get_context('forkserver')
    context.set_forkserver_preload([__name__, *(f'{p}.models' for p in PACKAGES)])
    waiting, running = list(models)[::-1], []
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            model = waiting.pop()
            process = context.Process(target=_run, args=(trial, model, memory, theirs))
            process.start()
            theirs.close()
            now = time.monotonic()
            # Importing everything is the fork server's work, once, on account of the first model.
            running.append(_Trial(model, process, ours, now, now + timeout + 120))
        connection.wait([one.messages for one in running], timeout=0.5)
        for one in list(running):
            row = _news(one, timeout)
            if row is not None:
                running.remove(one)
                one.process.join()
                one.messages.close()
                yield row


def _news(trial: _Trial, timeout: float) -> dict[str, Any] | None:
    """The row of this trial if it has ended."""
    try:
        while trial.messages.poll():
            message = trial.messages.recv()
            if isinstance(message, dict):
                return message
            trial.part = message
            limit = timeout if message == 'stock' else 3 * timeout
            trial.deadline = time.monotonic() + limit
    except EOFError:
        trial.process.join()
        return trial.failed(f'the process died with exit code {trial.process.exitcode}')
    if time.monotonic() > trial.deadline:
        return trial.failed(f'took longer than {timeout * (1 if trial.part == "stock" else 3):g} s')
    return None


def _run(
    trial: Callable[[StockModel, Callable[[str], None]], dict[str, Any]],
    model: StockModel,
    memory: float,
    messages: connection.Connection,
) -> None:
    """In the process: no output, no network, no more than `memory` GB beyond the start's."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.filterwarnings('ignore')
    logging.disable(logging.CRITICAL)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    limit = int(pages * resource.getpagesize() + memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    socket.socket.connect = socket.getaddrinfo = _refuse
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # untrained networks make many, and they are slow
    os.chdir(configs_of(model.package).parent)  # some configs name others by a relative path
    messages.send(trial(model, messages.send))


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError('the model wants to download something')
