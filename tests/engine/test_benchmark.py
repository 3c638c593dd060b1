"""Tests of mmsmart.engine.benchmark and tools/benchmark.py."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.runs import REPO, report, run_tool, smart_config, write_config
from mmsmart.engine.benchmark import (
    Subject,
    benchmark,
    cells,
    markdown,
    measure,
    peak_memory,
    weights_and_macs,
)

# The core


def test_every_round_runs_each_candidate_once_and_begins_with_another():
    calls = []
    measure({name: lambda name=name: calls.append(name) for name in 'abc'}, rounds=3, warmup=0)
    assert calls == [*'abc', *'bca', *'cab']


def test_times_are_milliseconds_and_compared_with_the_first(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr('time.perf_counter', lambda: clock[0])

    def run(seconds):
        clock[0] += seconds

    timings = measure({'long': lambda: run(0.5), 'short': lambda: run(0.125)}, rounds=5, warmup=0)
    assert timings['long'].low == timings['long'].median == timings['long'].high == 500
    assert timings['short'].median == 125
    assert timings['long'].speedup == 1 and timings['short'].speedup == 4


def test_the_speed_is_compared_within_a_round(monkeypatch):
    """A machine that is ten times slower for half of the time does not change the ratio."""
    clock = [0.0]
    monkeypatch.setattr('time.perf_counter', lambda: clock[0])
    calls = []

    def run(seconds):
        calls.append(seconds)
        clock[0] += seconds * (10 if len(calls) > 10 else 1)

    timings = measure({'one': lambda: run(2.0), 'other': lambda: run(1.0)}, rounds=10, warmup=0)
    assert timings['other'].speedup == 2


@pytest.mark.parametrize(('candidates', 'rounds'), [({}, 5), ({'a': print}, 1)])
def test_a_measurement_of_nothing_is_refused(candidates, rounds):
    with pytest.raises(ValueError, match='rounds: expected 2 or more'):
        measure(candidates, rounds)


def test_zeros_in_weights_are_counted_and_zeros_in_a_bias_are_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(model[0].bias)
    model[0].weight.data[:2] = 0
    counts = weights_and_macs(model.eval(), torch.ones(2, 3, 2, 2))
    assert counts == {
        'params': 12 + 4 + 8 + 32 + 2,
        'nonzero_params': 6 + 4 + 8 + 32 + 2,
        'macs': 12 * 4 + 32,
        'nonzero_macs': 6 * 4 + 32,
    }


# Models


@pytest.fixture
def run(tmp_path, finished_run):
    finished, _ = finished_run
    shutil.copy(finished / 'pruned.pth', tmp_path)
    write_config(tmp_path / 'config.py', smart_config(tmp_path))
    return tmp_path


def subject(folder, file=None, **settings):
    return Subject(folder / 'config.py', {}, file and folder / file, **settings)


def test_rows_agree_with_the_report_of_the_run(run, finished_run):
    finished, _ = finished_run
    subjects = {'dense': subject(run), 'pruned': subject(run, 'pruned.pth')}
    dense, pruned = benchmark(subjects, rounds=2, memory=False)
    figures = report(finished)
    assert {key: dense[key] for key in ('params', 'macs')}.items() <= figures['dense'].items()
    assert pruned['nonzero_params'] == figures['pruned']['params']
    assert pruned['nonzero_macs'] == figures['pruned']['macs']
    assert dense['file_mb'] is None
    assert pruned['file_mb'] == (run / 'pruned.pth').stat().st_size / 1e6
    assert dense['speedup'] == 1 and pruned['median'] > 0
    assert dense['memory_mb'] is pruned['memory_mb'] is None


def test_memory_holds_at_least_the_weights(run):
    if not Path('/proc/self/clear_refs').exists():
        pytest.skip('only Linux tells the peak')
    large = subject(run, shape=[16])
    large.options.update({'model.backbone.base_channels': 64, 'model.backbone.stem_channels': 64,
                          'model.head.in_channels': 512})  # fmt: skip
    weights = 11.2 * 4  # millions of parameters, bytes each
    assert weights < peak_memory(large) < weights + 100


def test_the_tool_writes_its_table(run, capsys):
    pytest.importorskip('onnxruntime')
    with warnings.catch_warnings():  # the tool sets filters of its own
        run_tool(
            REPO / 'tools/benchmark.py', str(run / 'config.py'), str(run / 'pruned.pth'), '--onnx',
            '--no-memory', '--rounds', '2', '--threads', '1', '--shape', '32', '--batch-size', '2',
            '--json', str(run / 'a.json'), '--markdown', str(run / 'a.md'),
        )  # fmt: skip
    rows = json.loads((run / 'a.json').read_text())
    names = ['dense', 'pruned.pth', 'dense as ONNX', 'pruned.pth as ONNX']
    assert [row['name'] for row in rows] == names
    assert rows[1]['nonzero_params'] == rows[3]['nonzero_params'] < rows[0]['nonzero_params']
    lines = (run / 'a.md').read_text().splitlines()
    assert len(lines) == 2 + len(rows) and lines[2].startswith('| dense |')
    assert 'pruned.pth' in capsys.readouterr().out


def test_a_missing_file_is_named(run):
    arguments = [str(run / 'config.py'), str(run / 'nowhere.onnx'), '--no-memory']
    with warnings.catch_warnings(), pytest.raises(SystemExit, match=r'nowhere\.onnx: there is no'):
        run_tool(REPO / 'tools/benchmark.py', *arguments)


def test_figures_that_are_not_known_are_left_out_of_the_table():
    timing = {'median': 2.0, 'low': 1.5, 'high': 10.49, 'speedup': 1.0}
    row = {'name': 'a.onnx', 'file_mb': None, 'memory_mb': None, **timing}
    assert cells([row]) == [['a.onnx', '', '', '', '2.00\n(1.50-10.5)', '1.00x', '']]
    assert markdown([row]).splitlines()[2] == '| a.onnx |  |  |  | 2.00 (1.50-10.5) | 1.00x |  |'
