# Copyright (c) mmsmart contributors.
"""How set-up talks and works: plain lines for people, everything else into a log file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

SIGN_OF_LIFE = 60  # seconds of silence after which a running command is reported as still running
LOG_TAIL = 15  # lines of the log shown when a command fails


class Failed(Exception):
    """Set-up cannot go on; the message says why and what to do about it."""


def say(line: str = '') -> None:
    """Print a line at once, on the error stream: the command that is run later owns the output."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A duration as people say it.

    >>> duration(7.6), duration(154)
    ('8 s', '2 min 34 s')
    """
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


@contextlib.contextmanager
def step(what: str, usually: str) -> Iterator[None]:
    """Say what begins and how long it usually takes, and at the end how long it took."""
    start = time.monotonic()
    say(f'* {what} (usually {usually})')
    yield
    say(f'  done in {duration(time.monotonic() - start)}')


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Let no second set-up work in this folder at the same time."""
    import fcntl  # not at the top: unit tests and messages work where it is missing

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'* waiting for another set-up that is at work in {folder}')
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it goes the lock


def run(
    command: Sequence[str | Path],
    log: Path,
    show: Callable[[str], str | None] = lambda line: None,
    causes: str = '',
    **popen,
) -> None:
    """Run a command into a log file and stop it when we are stopped.

    Args:
        command: Program and arguments.
        log: File that its output is appended to.
        show: Makes of a line of that output the line a person sees, or None.
        causes: What to check if it fails; part of the error message.
        **popen: More arguments of `subprocess.Popen`.

    Raises:
        Failed: The command failed; the message has the last lines of the log.
    """
    command = [str(part) for part in command]
    begin = last_sign = time.monotonic()
    finished = threading.Event()

    def sign_of_life() -> None:
        while not finished.wait(1):
            nonlocal last_sign
            if time.monotonic() - last_sign > SIGN_OF_LIFE:
                last_sign = time.monotonic()
                say(f'  still at it after {duration(last_sign - begin)}')

    with log.open('a', encoding='utf-8') as file:
        print('$', *command, file=file, flush=True)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding='utf-8',
            errors='replace',
            start_new_session=True,  # so that we can end the whole family: pip, ninja, compilers
            **popen,
        ) as process:
            threading.Thread(target=sign_of_life, daemon=True).start()
            try:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    shown = show(line.rstrip())
                    if shown:
                        last_sign = time.monotonic()
                        say(f'  {shown}')
                status = process.wait()
            finally:
                finished.set()
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
    if status:
        raise Failed(f'`{" ".join(command[:4])} ...` failed.\n{_tail(log)}\n{causes}'.rstrip())


def _tail(log: Path) -> str:
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    last = [f'    {line[:200]}' for line in lines if line.strip()][-LOG_TAIL:]
    return '\n'.join(['The last lines of its log:', *last, f'The whole log: {log}'])
