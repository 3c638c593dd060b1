"""Tests of tools/compare.py: what runs, what is kept, what is written.

Most runs here are those of a trainer that only pretends, and writes a result at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from engine.desks import COMMAND, NAMES, SUITE, TASK, TOOL, rows
from engine.runs import REPO, assert_finished, run_tool
from mmsmart.compare import JobFolder, config_text, jobs_of, read_suite, suite_of
from mmsmart.engine.compare import expect_valid

SUITES = sorted((REPO / 'configs/compare').glob('*.yaml'))


def test_a_suite_runs_in_order_and_ends_in_tables(desk):
    assert desk.run()
    assert desk.calls() == NAMES
    assert [float(row['value']) for row in rows(desk.root)] == [71.0, 70.0, 72.0, 71.0]
    assert {(row['dense'], row['params_kept'], row['macs_kept']) for row in rows(desk.root)} == {
        ('75.0', '0.4', '0.5')
    }
    assert '| smart | **71.50 ± 0.71 (2)** |' in desk.page()
    assert 'In **1 of 1** cells' in desk.page() and 'Missing' not in desk.page()
    assert '![net, 8x8](net-8x8.png)' in desk.page()
    assert '6 of 6 runs are finished, 0 failed' in desk.shown


def test_what_is_finished_is_not_run_again(desk):
    assert desk.run('--only', '*/seed0')
    assert desk.calls() == NAMES[:3]
    before = (desk.root / 'results.csv').read_text()
    desk.write()
    assert desk.run()
    assert desk.calls() == NAMES[3:]
    assert (desk.root / 'results.csv').read_text().startswith(before)
    desk.write()
    assert desk.run() and desk.calls() == []


def test_changed_settings_run_again_and_keep_what_was_there(desk):
    desk.run()
    desk.write(methods={'smart': {'temperature': {'start': 1.0}}, 'magnitude': {}})
    assert desk.run('--dry-run')
    assert desk.shown.count('changed') == 2
    assert desk.run()
    assert desk.calls() == [NAMES[1], NAMES[4]]
    assert (desk.root / f'{NAMES[1]}.replaced/pruning.json').is_file()


def test_a_row_that_is_new_leaves_the_others_alone(desk):
    desk.run()
    desk.write(
        methods={**SUITE['methods'], 'hot': {'method': 'smart', 'temperature': {'end': 1.0}}}
    )
    assert desk.run()
    assert desk.calls() == ['net/hot/8x8/0.7/seed0', 'net/hot/8x8/0.7/seed1']


def test_failures_are_recorded_and_the_others_go_on(desk):
    desk.write({NAMES[1]: 'fail', NAMES[2]: 'other metric'})
    assert not desk.run()
    assert desk.calls() == NAMES
    assert f'{NAMES[1]}: ended with exit code 1' in desk.shown
    assert 'ValueError: as ordered' in desk.shown and '4 of 6 runs are finished' in desk.shown
    page = desk.page()
    assert f'| {NAMES[1]} | ended with exit code 1: ValueError: as ordered |' in page
    assert "'accuracy/top1' is None in pruning.json, which has ['mIoU']" in page
    assert '| smart | **72.00 (1)** |' in page
    desk.write()
    assert desk.run()
    assert desk.calls() == NAMES[1:3]  # anew, without --resume


def test_a_failed_dense_run_takes_its_pruning_runs_with_it(desk):
    desk.write({NAMES[0]: 'fail'})
    assert not desk.run()
    assert desk.calls() == [NAMES[0], *NAMES[3:]]
    assert f'{NAMES[1]}: {NAMES[0]} failed, so it was not run' in desk.shown


def test_checkpoints_of_finished_pruning_runs_go_unless_they_are_kept(desk):
    desk.run('--only', NAMES[1], '--keep-checkpoints')
    assert (desk.root / NAMES[1] / 'epoch_1.pth').is_file()
    desk.run('--only', NAMES[2])
    assert not (desk.root / NAMES[2] / 'epoch_1.pth').is_file()
    assert (desk.root / NAMES[2] / 'pruning.json').is_file()
    assert (desk.root / NAMES[0] / 'epoch_1.pth').is_file()  # others start from it


def test_a_dry_run_writes_nothing_and_tables_alone_run_nothing(desk):
    assert desk.run('--dry-run')
    assert [line.split()[-1] for line in desk.shown.splitlines()[:-1]] == NAMES
    assert '6 runs, 2 dense and 4 pruning; 0 finished' in desk.shown
    assert not desk.root.exists()
    assert not desk.run('--table-only')
    assert desk.calls() == [] and rows(desk.root) == []
    assert '0 of 4 runs are finished' in desk.page() and '4 runs were not made' in desk.page()


def test_tables_alone_count_dense_runs_and_tell_other_settings_from_failures(desk):
    assert not desk.run('--table-only')
    assert '0 of 6 runs are finished, 0 failed; tables' in desk.shown
    assert not desk.run('--table-only', '--only', '*/dense/*')
    assert '0 of 2 runs are finished' in desk.shown
    desk.write({NAMES[2]: 'fail'})
    desk.run('--only', '*/seed0')
    desk.write(methods={'smart': {'temperature': {'end': 0.1}}, 'magnitude': {}})
    assert not desk.run('--table-only')
    assert '1 of 6 runs are finished, 1 failed, 1 have other settings; tables' in desk.shown
    assert desk.run('--table-only', '--only', 'net/dense/seed0')


def test_missing_weights_are_named_before_any_run(desk):
    task = {**TASK, 'checkpoint': 'nowhere/seed{seed}.pth'}
    desk.write(tasks={'net': task})
    with pytest.raises(FileNotFoundError, match=r'tasks.net.checkpoint: nowhere/seed0.pth is not'):
        desk.run()
    assert desk.calls() == []


def _heed_interrupts():
    # What a shell starts in the background ignores them, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupting_the_tool_ends_what_it_started(desk):
    desk.write({NAMES[0]: 'hang'})
    words = [sys.executable, TOOL, 'trial.yaml', '--jobs', '1', '--command', ' '.join(COMMAND)]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(REPO), *sys.path])}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    ) as process:
        try:
            while not (desk.root / NAMES[0] / 'last_checkpoint').is_file():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            shown, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130 and 'the same command goes on from here' in shown
    folder = JobFolder(desk.root, jobs_of(read_suite('trial.yaml'))[0])
    with folder.lock() as lock:  # nothing that it started is alive and holds it
        assert not lock.closed


@pytest.mark.parametrize('path', SUITES, ids=lambda path: path.stem)
def test_shipped_suite_can_run_as_far_as_can_be_told_without_data(path, tmp_path):
    jobs = jobs_of(read_suite(path))
    if all(find_spec(Path(job.config).parent.name) for job in jobs):
        expect_valid(jobs)
    assert len({job.name for job in jobs}) == len(jobs) > 0
    for job in jobs:
        names: dict = {}
        exec(config_text(job, tmp_path / 'seed.py', None), names)
        assert (tmp_path / names['_base_'][0]).resolve().is_file()


@pytest.mark.parametrize('path', SUITES, ids=lambda path: path.stem)
def test_configs_of_a_shipped_suite_inherit_what_they_change(path, tmp_path):
    """Each first run of a task, if its toolbox is there: an option must not make up a setting."""
    from mmengine.config import Config

    from mmsmart.engine.stock_tools import enable_inheritance

    enable_inheritance()
    suite = read_suite(path)
    for task in suite.tasks:
        job = next(job for job in jobs_of(suite) if job.task == task and job.method)
        if find_spec(Path(job.config).parent.name) is None:
            pytest.skip(f'{Path(job.config).parent.name} is not installed')
        file = tmp_path / 'seed.py'
        file.write_text(config_text(job, file, None))
        stock, config = Config.fromfile(REPO / job.config), Config.fromfile(file)
        assert config.runner_type == 'mmsmart.SmartRunner'
        assert config.smart.sparsity == job.sparsity and config.randomness.seed == job.seed
        assert '_delete_' not in str(config)
        new = set(keys(config.to_dict())) - set(keys(stock.to_dict()))
        assert new <= {
            'custom_hooks',
            'smart.sparsity',
            'randomness.seed',
            'optim_wrapper.type',
            'optim_wrapper.dtype',
            'param_scheduler.T_max',
            'val_dataloader.dataset.split',
        }


def test_documentation_counts_the_runs_of_every_shipped_suite():
    page = (REPO / 'docs/comparing.md').read_text()
    rows = re.findall(r'^\| (`.*\.yaml`) \| (.*?) \|', page, re.M)
    told = {}
    for names, counts in rows:
        told |= zip(re.findall(r'`(\w+)\.yaml`', names), counts.split('; '), strict=True)
    planned = {}
    for path in SUITES:
        jobs = jobs_of(read_suite(path))
        dense = sum(job.method is None for job in jobs)
        planned[path.stem] = (f'{dense} dense, ' if dense else '') + str(len(jobs) - dense)
    assert told == planned


def keys(part, prefix=''):
    """Dotted keys of all that is in dictionaries inside dictionaries."""
    for key, value in part.items():
        yield f'{prefix}{key}'
        if isinstance(value, dict):
            yield from keys(value, f'{prefix}{key}.')


def test_a_tuning_suite_is_scored_on_a_validation_split():
    (path,) = [path for path in SUITES if path.stem.endswith('_tuning')]
    for job in jobs_of(read_suite(path)):
        assert job.options['val_dataloader']['dataset']['split'] == 'val'


def test_two_methods_on_digits_come_out_of_one_command(tmp_path, monkeypatch):
    task = {
        'config': 'configs/mmpretrain/resnet18_digits_smart.py',
        'metric': 'accuracy/top1',
        'options': {
            'train_cfg': {'max_epochs': 3, 'val_interval': 3},
            'param_scheduler.periods': [1, 2],
            'smart.stages': {'pretrain': 0.34, 'search': 0.33, 'finetune': 0.33},
            'smart.importance': {'batches': 1},
            'train_dataloader.dataset.indices': 128,
            'val_dataloader.dataset.indices': 150,
        },
    }
    grid = {**SUITE, 'tasks': {'digits': task}, 'sparsities': [0.8], 'seeds': [0]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(REPO), *sys.path]))
    Path('digits.yaml').write_text(yaml.safe_dump(grid, sort_keys=False))
    log = tmp_path / 'log'
    assert_finished(run_tool, TOOL, 'digits.yaml', '--work-dir', 'out', '--jobs', '2', log=log)
    assert (tmp_path / 'out/digits-8x8.png').read_bytes().startswith(b'\x89PNG')
    results = rows(tmp_path / 'out')
    assert [row['method'] for row in results] == ['smart', 'magnitude']
    for row, job in zip(results, jobs_of(suite_of(grid, 'digits'))):
        report = json.loads((tmp_path / 'out' / job.name / 'pruning.json').read_text())
        assert report['method'] == row['method']
        assert float(row['value']) == pytest.approx(report['pruned']['accuracy/top1'], abs=1e-3)
        assert float(row['dense']) == pytest.approx(report['dense']['accuracy/top1'], abs=1e-3)
        assert 0.8 <= float(row['achieved_sparsity']) < 0.81 and float(row['seconds']) > 0
    # The same seed trains the same dense network, whatever is made of it afterwards.
    assert results[0]['dense'] == results[1]['dense']
