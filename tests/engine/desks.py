"""A desk for tests of comparisons: a small suite, and a trainer that only pretends."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from engine.runs import REPO

TOOL = REPO / 'tools/compare.py'
COMMAND = [sys.executable, '-S', 'trainer.py']
# Notes that it was called, does as told in orders.json, and writes what a run would.
TRAINER = """
import json, sys, time
from pathlib import Path
config, work_dir = sys.argv[1], Path(sys.argv[sys.argv.index('--work-dir') + 1])
names = {}
exec(Path(config).read_text(), names)
job = Path(config).read_text().splitlines()[0].removeprefix('# ')
with open('calls', 'a') as calls:
    calls.write(job + (' --resume' if '--resume' in sys.argv else '') + '\\n')
order = json.loads(Path('orders.json').read_text()).get(job)
print('training', job)
(work_dir / 'epoch_1.pth').write_text('weights')
(work_dir / 'last_checkpoint').write_text('/moved/since/epoch_1.pth')
if order == 'fail':
    sys.exit('ValueError: as ordered')
if order == 'hang':
    time.sleep(600)
if 'smart' in names:
    smart, seed = names['smart'], names['randomness']['seed']
    assert '/dense/' not in names['load_from'] or Path(names['load_from']).is_file()
    value = 70.0 + seed + (1.0 if smart['method'] == 'smart' else 0.0)
    figures = {'params': 100, 'macs': 1000}
    report = dict(
        method=smart['method'], resource='params', target_sparsity=smart['sparsity'],
        achieved_sparsity=smart['sparsity'], budget=50, kept=50, next_block_cost=1,
        dense={**figures, 'accuracy/top1': 75.0}, layers=[], excluded=[],
        pruned={'params': 40, 'macs': 500, 'accuracy/top1': value},
    )
    if order == 'other metric':
        report['pruned']['mIoU'] = report['pruned'].pop('accuracy/top1')
    (work_dir / 'pruning.json').write_text(json.dumps(report))
"""
TASK = {
    'dense': 'configs/mmpretrain/resnet14_1xb64_cifar10.py',
    'config': 'configs/mmpretrain/resnet14_1xb64_cifar10_smart.py',
    'metric': 'accuracy/top1',
}
SUITE = {
    'tasks': {'net': TASK},
    'methods': {'smart': {}, 'magnitude': {}},
    'blocks': ['8x8'],
    'sparsities': [0.7],
    'seeds': [0, 1],
}
NAMES = [
    f'net/{part}/seed{seed}'
    for seed in (0, 1)
    for part in ('dense', 'smart/8x8/0.7', 'magnitude/8x8/0.7')
]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a suite and the trainer; calling it runs the tool in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    # Takes longer than the runs.
    monkeypatch.setattr('mmsmart.compare.draw_curves', lambda results, methods, path: path.touch())
    Path('trainer.py').write_text(TRAINER)
    tool = runpy.run_path(str(TOOL))
    desk = SimpleNamespace(root=tmp_path / 'work_dirs/compare/trial', shown='')

    def write(orders=None, **changes):
        Path('trial.yaml').write_text(yaml.safe_dump({**SUITE, **changes}, sort_keys=False))
        Path('orders.json').write_text(json.dumps(orders or {}))
        Path('calls').write_text('')

    def run(*arguments):
        args = ['trial.yaml', '--jobs', '1', '--command', ' '.join(COMMAND), *arguments]
        with Path('shown').open('w') as file:
            is_complete = tool['compared'](tool['parse_args'](args), Console(file=file, width=300))
        desk.shown = Path('shown').read_text()
        return is_complete

    desk.write, desk.run = write, run
    desk.calls = lambda: Path('calls').read_text().splitlines()
    desk.page = lambda: (desk.root / 'results.md').read_text()
    write()
    return desk


def rows(root):
    with (root / 'results.csv').open() as file:
        return list(csv.DictReader(file))
