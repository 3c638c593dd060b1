"""The starts of a run: MMEngine makes a folder for each, with scalars, config and log in it."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from mmengine.dist import get_world_size, master_only
from mmengine.runner import Runner

from mmsmart.blocks import BlockLayer
from mmsmart.engine.runner_models import trained_model
from mmsmart.export import complete_or_absent, plain
from mmsmart.html_report.run import Start
from mmsmart.masking import BlockMasks
from mmsmart.plans import ChannelPlan
from mmsmart.version import __version__

_Named = TypeVar('_Named')  # has a `name`
_RECORD = 'start.json'
_PACKAGES = (
    'torch', 'torchvision', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'mmyolo', 'numpy'
)  # fmt: skip
_LOGGED = {
    'versions': re.compile(r'^ +(Python|PyTorch|TorchVision|OpenCV|MMEngine): (\S+)'),
    'resumed': re.compile(r'resumed epoch: \d+, iter: (\d+)'),
    'search': re.compile(r'mmsmart: search over iterations (\d+) to (\d+)'),
    'epoch': re.compile(r'Epoch\(train\)\s+\[\d+\]\[\s*\d+/(\d+)\]'),
    'end': re.compile(r'Iter\(train\)\s+\[\s*\d+/(\d+)\]'),
}


@master_only
def note_start(
    runner: Runner,
    masks: BlockMasks,
    positions: dict[str, int],
    begin: int,
    end: int,
    method: str = 'smart',
) -> None:
    """Write `start.json` into the log folder of this start: what only the running process knows.

    Args:
        runner: The runner, about to train.
        masks: Its masks.
        positions: Uses of each layer's weights in one forward pass, by name.
        begin: First iteration of the search.
        end: First iteration of the fine-tuning.
        method: 'smart' or a baseline's name.
    """
    loaded = {name: getattr(sys.modules.get(name), '__version__', None) for name in _PACKAGES}
    versions = {'mmsmart': __version__, 'python': '.'.join(map(str, sys.version_info[:3]))}
    record = {
        'command': shlex.join(sys.orig_argv),
        'processes': get_world_size(),
        'versions': {**versions, **{name: text for name, text in loaded.items() if text}},
        'iteration': runner.iter,
        'stages': {'search': begin, 'finetune': end, 'end': runner.max_iters},
        'method': method,
        'budgets': [
            {
                'part': budget.target.part,
                'resource': budget.target.resource,
                'unit': budget.unit,
                'target_sparsity': budget.target.sparsity,
                'total': budget.total,
                'budget': budget.amount,
            }
            for budget in masks.budgets
        ],
        'layers': [
            {
                'name': layer.name,
                'shape': layer.weight.shape,
                'block': _written_block(masks, layer),
                'groups': layer.groups,
                'params_total': layer.weight.numel(),
                'macs_total': layer.weight.numel() * positions.get(layer.name, 0),
            }
            for layer in in_network_order(masks.layers, runner)
        ],
        'excluded': [{'name': item.name, 'reason': item.reason} for item in masks.excluded],
    }
    with complete_or_absent(Path(runner.log_dir) / _RECORD) as temporary:
        temporary.write_text(json.dumps(plain(record), indent=2) + '\n')


def in_network_order(layers: Iterable[_Named], runner: Runner) -> list[_Named]:
    """Layers as the model has them, where plans have them part by part."""
    model = trained_model(runner)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(layers, key=lambda layer: order[layer.name])


def _written_block(masks: BlockMasks, layer: BlockLayer) -> str | tuple[int, ...]:
    """As in `pruning.json`."""
    if isinstance(masks.plan, ChannelPlan):
        return 'channel'
    return ':'.join(map(str, layer.n_of_m)) if layer.n_of_m else layer.weight_block


@dataclass
class StartLog:
    """What the folder of one start tells.

    Args:
        folder: The folder.
        start: When, where from, and by what command.
        rows: Its scalars, in the order in which they were written; rows of training have `iter`.
        record: `start.json`; empty if it was not written.
        search: First iteration of search and fine-tuning, as logged.
        epoch: Iterations of an epoch, as logged.
        end: Iterations of the run, as logged.
    """

    folder: Path
    start: Start
    rows: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    search: tuple[int, int] | None = None
    epoch: int | None = None
    end: int | None = None


def read_starts(work_dir: Path) -> list[StartLog]:
    """The starts of the last training in a folder; what an earlier one left there is not of it."""
    folders = sorted(path for path in work_dir.iterdir() if re.fullmatch(r'\d{8}_\d{6}', path.name))
    logs = [log for log in map(_read_start, folders) if log.record or _is_training(log.rows)]
    anew = [i for i, log in enumerate(logs) if not log.start.iteration]
    return logs[anew[-1] :] if anew else logs


def _is_training(rows: list[dict[str, Any]]) -> bool:
    return any('iter' in row for row in rows)


def _read_start(folder: Path) -> StartLog:
    record = _json(folder / _RECORD)
    log = StartLog(folder, Start(''), _scalars(folder / 'vis_data/scalars.json'), record)
    resumed, versions = _read_text(log, folder / f'{folder.name}.log')
    command, processes = record.get('command'), record.get('processes', 1)
    log.start = Start(
        str(datetime.strptime(folder.name, '%Y%m%d_%H%M%S')),
        record.get('iteration', resumed),
        f'{command}  # one of {processes} processes' if processes > 1 else command,
        record.get('versions') or versions,
    )
    return log


def _read_text(log: StartLog, file: Path) -> tuple[int, dict[str, str]]:
    """Fill in what the text of the log tells; gives the iterations done before, and versions."""
    versions, resumed = {}, 0
    with file.open(errors='replace') if file.is_file() else io.StringIO() as lines:
        for line in lines:
            if found := _LOGGED['versions'].match(line):
                versions[found[1].lower().replace('pytorch', 'torch')] = found[2]
            elif found := _LOGGED['resumed'].search(line):
                resumed = int(found[1])
            elif found := _LOGGED['search'].search(line):
                log.search = int(found[1]), int(found[2])
            elif not log.epoch and (found := _LOGGED['epoch'].search(line)):
                log.epoch = int(found[1])
            elif not log.end and (found := _LOGGED['end'].search(line)):
                log.end = int(found[1])
    return resumed, versions


def _scalars(file: Path) -> list[dict[str, Any]]:
    """Rows of a file that may still be written: a last line that is cut off is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
