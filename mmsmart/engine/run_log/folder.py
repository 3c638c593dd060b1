"""A `work_dir` as one :class:`~mmsmart.html_report.run.Run`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmsmart.engine.checkpoints import load_checkpoint
from mmsmart.engine.config import Stages
from mmsmart.engine.run_log.masks import (
    Checkpoint,
    importances,
    newest_checkpoint,
    with_masks,
    with_weights,
)
from mmsmart.engine.run_log.starts import StartLog, read_starts
from mmsmart.html_report.run import Layer, Run, Timeline
from mmsmart.pruning_json import read_report

_TIMES = ('time', 'data_time', 'step')
_LATER = 'It comes with pruning.json, at the end of the run.'


def read_run(work_dir: str | Path, name: str = '') -> Run:
    """Read what a run has written so far; what is not there is named in `missing`.

    Args:
        work_dir: Folder of a run, finished or still going.
        name: What to call it; the folder's name if not given.

    Raises:
        FileNotFoundError: If it is not the folder of a training run.
    """
    folder = Path(work_dir)
    logs = read_starts(folder) if folder.is_dir() else []
    if not logs and not (folder / 'pruning.json').is_file():
        raise FileNotFoundError(
            f'{folder}: not the folder of a training run. A `work_dir` is wanted, with the log '
            'folders that MMEngine makes in it (such as 20261123_104500), or with pruning.json.'
        )
    checkpoint = newest_checkpoint(folder, _began(logs))
    record = next((log.record for log in reversed(logs) if log.record), {})
    run = Run(name or folder.resolve().name, str(folder), starts=[log.start for log in logs])
    run.config, settings = _config(logs)
    run.timeline = _timeline(logs, record, settings, checkpoint)
    _read_curves(run, logs)
    report = _report_of(folder, run, logs)
    run.finished = bool(report)
    run.iteration = max([row['iter'] for row in run.train] + [checkpoint.iteration])
    if report and run.timeline:
        run.iteration = run.timeline.end
    smart = settings.get('smart') or {}
    run.method = (report or record or smart).get('method', 'smart')
    run.budgets = _budgets(report or record, checkpoint)
    run.dense = report.get('dense') or _dense_metrics(run, checkpoint)
    run.pruned = dict(report.get('pruned', {}))
    run.excluded = _excluded(report or record)
    _read_masks(run, folder, report, record, checkpoint)
    run.importances = importances(checkpoint)
    _name_what_is_missing(run, checkpoint)
    return run


def _began(logs: Sequence[StartLog]) -> str:
    """When the training began, as MMEngine names its folders; '' where they have other names."""
    name = logs[0].folder.name if logs else ''
    return name if re.fullmatch(r'\d{8}_\d{6}', name) else ''


def _report_of(folder: Path, run: Run, logs: Sequence[StartLog]) -> dict[str, Any]:
    """`pruning.json`, unless it is older than a training that goes on since."""
    file = folder / 'pruning.json'
    if not file.is_file():
        return {}
    scalars = logs[-1].folder / 'vis_data/scalars.json' if logs else file
    if scalars.is_file() and file.stat().st_mtime < scalars.stat().st_mtime:
        logged = [0, *(row['iter'] for row in run.train)]
        step = max((later - one for one, later in itertools.pairwise(logged)), default=0)
        if run.timeline and logged[-1] + step < run.timeline.end:
            return {}
    return read_report(file)


def _config(logs: Sequence[StartLog]) -> tuple[str, dict[str, Any]]:
    """The config as text, and read."""
    file = logs[-1].folder / 'vis_data/config.py' if logs else None
    if file is None or not file.is_file():
        return '', {}
    return file.read_text(), Config.fromfile(file, use_predefined_variables=False).to_dict()


def _timeline(
    logs: Sequence[StartLog],
    record: dict[str, Any],
    settings: dict[str, Any],
    checkpoint: Checkpoint,
) -> Timeline | None:
    """Where the stages begin: as recorded, else as logged, else as the config says."""
    if record:
        return Timeline(**record['stages'])
    loop = settings.get('train_cfg') or {}
    epoch = next((log.epoch for log in logs if log.epoch), None)
    end = checkpoint.info.get('max_iters') or next((log.end for log in logs if log.end), None)
    if not end and epoch and loop.get('max_epochs'):
        end = epoch * loop['max_epochs']
    end = end or loop.get('max_iters')
    if not end:
        return None
    logged = next((log.search for log in logs if log.search), None)
    hooks = [hook for hook in settings.get('custom_hooks') or [] if 'Smart' in str(hook['type'])]
    pruning = [*hooks, *([settings['smart']] if settings.get('smart') else [])]
    if not logged and not pruning:
        return None
    stages = next((part['stages'] for part in pruning if part.get('stages')), {})
    return Timeline(*(logged or Stages(**stages).boundaries(end)), end)


def _read_curves(run: Run, logs: Sequence[StartLog]) -> None:
    """Rows of all starts in one line; what a resumption did once more counts once."""
    for log in logs:
        begin = log.start.iteration
        run.train = [row for row in run.train if row['iter'] <= begin]
        run.validation = [(i, metrics) for i, metrics in run.validation if i <= begin]
        search = run.timeline.search if run.timeline else None
        for i, row in enumerate(log.rows):
            if 'iter' in row:
                run.train.append(row)
                continue
            metrics = {key: value for key, value in row.items() if key not in _TIMES}
            metrics = {key: x for key, x in metrics.items() if isinstance(x, (int, float))}
            after = [r['iter'] for r in log.rows[i:] if 'iter' in r][:1]
            before = run.train[-1]['iter'] if run.train else begin
            ends = before, (after or [math.inf])[0]
            run.validation.append((_iteration_of(row, ends, log.epoch, search), metrics))


def _iteration_of(
    row: dict[str, Any], ends: tuple[int, float], epoch: int | None, search: int | None
) -> int:
    """When a validation was made: its `step` counts epochs or iterations, and it stands in order.

    The one before the search may lie in the middle of an epoch.
    """
    step = row.get('step', 0)
    for found in (step * (epoch or 0), step, search):
        if found is not None and ends[0] <= found <= ends[1]:
            return found
    return ends[0]


def _dense_metrics(run: Run, checkpoint: Checkpoint) -> dict[str, float]:
    """What was measured before the search, if that has been."""
    if not run.timeline or run.iteration < run.timeline.search:
        return {}
    before = (metrics for i, metrics in run.validation if i == run.timeline.search)
    return checkpoint.info.get('smart_dense_metrics') or next(before, {})


def _budgets(report: dict[str, Any], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    if 'budgets' in report:
        return report['budgets']
    if not report:
        keys = ('part', 'resource', 'target_sparsity', 'budget')
        return [dict(zip(keys, row)) for row in checkpoint.masks.get('budgets', [])]
    keys = ('resource', 'target_sparsity', 'total', 'budget', 'kept', 'next_block_cost')
    one = {key: report[key] for key in keys if key in report}
    if 'kept' in one and report['achieved_sparsity'] < 1:
        one.setdefault('total', round(one['kept'] / (1 - report['achieved_sparsity']), 3))
    return [{'part': '', **one}] if one else []


def _excluded(report: dict[str, Any]) -> list[tuple[str, str]] | None:
    if 'excluded' not in report:
        return None
    return [(item['name'], item['reason']) for item in report['excluded']]


def _read_masks(
    run: Run,
    folder: Path,
    report: dict[str, Any],
    record: dict[str, Any],
    checkpoint: Checkpoint,
) -> None:
    rows = (report or record).get('layers', [])
    rows = [row for row in rows if len(row['shape']) > 1]  # without the norms of cut channels
    keys = ('params_total', 'params_kept', 'macs_total', 'macs_kept')
    run.layers = [
        Layer(
            row['name'], tuple(row['shape']), **{key: row[key] for key in keys if key in row},
            at_floor=row.get('at_floor', False),
        )
        for row in rows
    ]  # fmt: skip
    blocks = {row['name']: (row['block'], row.get('groups', 1)) for row in rows}
    if report and (folder / 'pruned.pth').is_file():
        weights = load_checkpoint(folder / 'pruned.pth')['state_dict']
        run.layers, run.masks_from = with_weights(run.layers, blocks, weights), 'pruned.pth'
    elif checkpoint.state == 'hard' and rows:
        run.layers = with_weights(run.layers, blocks, checkpoint.weights)
        run.masks_from = f'{checkpoint.file}, at iteration {checkpoint.iteration:,}'
    elif checkpoint.state in ('soft', 'hard'):
        run.layers = with_masks(run.layers, checkpoint)
        run.masks_from = (
            f'{checkpoint.file}, at iteration {checkpoint.iteration:,}: {checkpoint.state} masks'
        )


def _name_what_is_missing(run: Run, checkpoint: Checkpoint) -> None:
    if not run.train:
        run.missing['training'] = (
            'No scalars are logged yet. If the run does not use it, add '
            "dict(type='LocalVisBackend') to visualizer.vis_backends."
        )
    if not run.series('undecided')[0]:
        run.missing['decisions'] = (
            'Nothing was logged in a search: it was shorter than the interval of the log, or the '
            'method has none.'
            if run.finished
            else 'The search has not logged yet.'
        )
    if not any(layer.density is not None for layer in run.layers):
        run.missing['density'] = (
            'Coupled channels and N:M are shown once they are decided.'
            if checkpoint.state == 'soft'
            else 'No checkpoint was saved since the search began: no mask yet.'
        )
    if not any(layer.image is not None for layer in run.layers):
        run.missing['masks'] = run.missing.get(
            'density', 'Neither pruned.pth nor a checkpoint of the run is there.'
        )
    if run.importances is None:
        run.missing['importance'] = (
            'Each row of N:M has a threshold of its own until it is decided.'
            if checkpoint.state == 'soft'
            else 'No checkpoint of the search or of the fine-tuning is there.'
        )
    if not run.budgets:
        run.missing['budget'] = _LATER
    if run.excluded is None:
        run.missing['excluded'] = _LATER
    if not run.pruned:
        run.missing['metrics'] = 'What was pruned is measured at the end of the run.'
    if not any(start.command for start in run.starts):
        run.missing['provenance'] = 'This run did not record its command.'
