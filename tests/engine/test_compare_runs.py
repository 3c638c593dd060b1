"""Tests of the runs of a comparison: their processes, and the folders that these share."""

from __future__ import annotations

import time
from contextlib import closing

from engine.desks import COMMAND, NAMES
from mmsmart.compare import JobFolder, jobs_of, read_suite, run_jobs


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
