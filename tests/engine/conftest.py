"""What several tests use; runs that they only look at are made once."""

from __future__ import annotations

from multiprocessing import forkserver
from pathlib import Path

import pytest

from engine.desks import desk
from engine.runs import smart_config, train

__all__ = ['desk']


@pytest.fixture(scope='session', autouse=True)
def fork_server() -> None:
    """Start the server of `engine.runs`: a process has one, and the first user fills it.

    A later one with mmsmart imported would make every stock process know mmsmart.
    """
    forkserver.ensure_running()


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Folder and notes of an undisturbed run of all three stages."""
    work_dir = tmp_path_factory.mktemp('finished')
    outcome = train(smart_config(work_dir))
    assert outcome.exitcode == 0 and outcome.error is None, outcome.log
    return work_dir, outcome.value
