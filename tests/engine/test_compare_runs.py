"""Tests of the runs of a comparison: their processes, and the folders that these share."""

from __future__ import annotations

import errno
import fcntl
import socket
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from engine.desks import COMMAND, NAMES
from mmsmart.compare import JobFolder, environments, jobs_of, read_suite, run_jobs


def test_a_stopped_run_is_ended_and_goes_on_from_its_checkpoint(desk):
    desk.write({NAMES[0]: 'hang'})
    jobs = jobs_of(read_suite('trial.yaml'))
    with closing(run_jobs(jobs, desk.root, COMMAND, [{}])) as events:
        assert next(events)[1] == 'started'
        while not (desk.root / NAMES[0] / 'last_checkpoint').is_file():
            time.sleep(0.05)
        time.sleep(0.2)
    record = JobFolder(desk.root, jobs[0]).record()
    assert record['state'] == 'begun' and record['seconds'] > 0
    desk.write()
    assert desk.run('--only', NAMES[0])
    assert desk.calls() == [f'{NAMES[0]} --resume']
    assert JobFolder(desk.root, jobs[0]).record()['seconds'] > record['seconds']


def test_a_run_that_another_process_holds_is_left_to_it(desk):
    jobs = jobs_of(read_suite('trial.yaml'))
    holder = JobFolder(desk.root, jobs[0])
    lock = holder.lock()
    with closing(run_jobs(jobs[:1], desk.root, COMMAND, [{}])) as events:
        assert next(events)[1] == 'held'
        holder.prepare()
        (holder.path / 'epoch_1.pth').touch()
        (holder.path / 'last_checkpoint').write_text('epoch_1.pth')
        holder.note_end('done', 1.0)
        lock.close()
        assert next(events)[1] == 'done'
    assert desk.calls() == []


def test_failed_run_is_not_run_again_by_another_process(desk):
    """Neither if it was found held, nor if it failed while this process looked elsewhere."""
    desk.write({NAMES[0]: 'fail', NAMES[3]: 'fail'})
    assert not desk.run('--only', '*/dense/*')  # long ago, so both are tried again
    desk.write({NAMES[0]: 'fail', NAMES[3]: 'fail'})
    jobs = jobs_of(read_suite('trial.yaml'))
    holder = JobFolder(desk.root, jobs[0])
    lock = holder.lock()
    with closing(run_jobs(jobs, desk.root, COMMAND, [{}])) as events:
        assert next(events)[:2] == (jobs[0], 'held')
        lock.close()
        assert not desk.run('--only', '*/dense/*')
        calls = desk.calls()
        told = {job.name: (state, record['reason']) for job, state, record in events}
    assert calls == desk.calls() == [NAMES[0], NAMES[3]]
    assert told[NAMES[0]] == told[NAMES[3]] == ('failed', 'ended with exit code 1')
    assert told[NAMES[1]] == ('failed', f'{NAMES[0]} failed, so it was not run.')


def test_a_run_has_a_port_that_no_other_listens_on(desk, monkeypatch):
    monkeypatch.delenv('PORT', raising=False)
    listening = 'import os, socket; socket.create_server(("", int(os.environ["PORT"])))'
    jobs = jobs_of(read_suite('trial.yaml'))[:1]
    with closing(socket.socket()) as other:  # of another process of the tool
        with suppress(OSError):
            other.bind(('', 29500))
            other.listen()
        list(run_jobs(jobs, desk.root, [sys.executable, '-c', listening], environments(1, [], 1)))
    folder = JobFolder(desk.root, jobs[0])
    assert folder.record()['reason'] == 'ended without a checkpoint', folder.last_lines()


def settings(**changes):
    """Methods of which only the first has these settings."""
    return {'smart': changes, 'magnitude': {}}


def test_a_start_that_fails_keeps_what_a_finished_run_wrote(desk):
    desk.run('--only', NAMES[1])
    replaced = desk.root / f'{NAMES[1]}.replaced'
    desk.write(methods=settings(recalibrate=1))
    Path('no_format').write_text('no program')
    Path('no_format').chmod(0o755)
    for _ in range(2):
        assert not desk.run('--only', NAMES[1], '--command', './no_format')
        assert 'Exec format error' in desk.shown
        assert (replaced / 'pruning.json').is_file()
    assert desk.run('--only', NAMES[1])
    assert (replaced / 'pruning.json').is_file()


def test_of_replaced_runs_a_finished_one_is_kept_rather_than_a_failed_one(desk):
    desk.run('--only', NAMES[1])
    replaced = desk.root / f'{NAMES[1]}.replaced'
    for value in (1, 2):
        desk.write({NAMES[1]: 'fail'}, methods=settings(recalibrate=value))
        assert not desk.run('--only', NAMES[1])
        assert (desk.root / NAMES[1] / 'epoch_1.pth').is_file()
        assert (replaced / 'pruning.json').is_file()


def test_a_command_that_is_not_there_is_refused_before_anything_changes(desk):
    desk.run('--only', NAMES[1])
    before = {path: path.stat().st_mtime_ns for path in (desk.root / 'net').rglob('*')}
    desk.write(methods=settings(recalibrate=1))
    with pytest.raises(ValueError, match=r"command: expected a program .*, got 'no_such -x'"):
        desk.run('--only', NAMES[1], '--command', 'no_such -x')
    assert before == {path: path.stat().st_mtime_ns for path in (desk.root / 'net').rglob('*')}


def test_a_file_system_without_locks_is_named_and_not_waited_for(desk, monkeypatch):
    def no_locks(file, flags):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    jobs = jobs_of(read_suite('trial.yaml'))
    message = r'work-dir: .*trial is on .* \(No locks available\)'
    with pytest.raises(ValueError, match=message):
        next(run_jobs(jobs, desk.root, COMMAND, [{}]))
    assert desk.calls() == []
