"""Tiny runs for the tests, each in a process of its own that is forked from a warm server.

MMEngine keeps loggers, hubs and scopes for a whole process, and some runs here are killed.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
BASE = REPO / 'configs/_base_/smart.py'

_PROCESSES = multiprocessing.get_context('forkserver')
# Not mmsmart: a stock process must be able to say that it has never seen it.
_PROCESSES.set_forkserver_preload(
    ['mmpretrain', 'mmpretrain.apis', 'mmpretrain.datasets', 'mmpretrain.evaluation',
     'mmpretrain.models', 'mmdet', 'mmdet.apis', 'mmdet.datasets', 'mmdet.engine',
     'mmdet.evaluation', 'mmdet.models', 'mmdet.visualization', 'mmseg', 'mmseg.apis',
     'mmseg.datasets', 'mmseg.engine', 'mmseg.evaluation', 'mmseg.models', 'mmseg.visualization',
     'sklearn.datasets', 'matplotlib.backends.backend_agg']
)  # fmt: skip


@dataclass
class Outcome:
    """How a process ended: with a value, with an error, or by a signal."""

    exitcode: int
    value: Any = None
    error: str | None = None
    log: str = ''


def apart(function: Callable[..., Any], *args: Any, log: Path | None = None) -> Outcome:
    """Call a function in a fresh process; arguments and value are pickled."""
    return finished(*begun(function, *args, log=log))


def begun(function: Callable[..., Any], *args: Any, log: Path | None = None) -> tuple[Any, ...]:
    """Start :func:`apart` without waiting for its end."""
    receive, send = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_call, args=(send, log, function, args))
    process.start()
    send.close()
    return process, receive, log


def finished(process: Any, receive: Any, log: Path | None) -> Outcome:
    """Wait for what :func:`begun` started."""
    try:
        value, error = receive.recv()
    except EOFError:
        value, error = None, None
    process.join()
    text = log.read_text(errors='replace') if log is not None and log.is_file() else ''
    return Outcome(process.exitcode, value, error, text)


def _call(send: Any, log: Path | None, function: Callable[..., Any], args: Any) -> None:
    import mmengine.config.config
    import numpy as np
    import torch

    # MMEngine formats the config anew for every checkpoint, which takes longer than the run.
    mmengine.config.config.FormatCode = lambda text, **settings: (text, True)
    np.random.seed()  # the server's would be everybody's, and a run without a seed asks it for one
    torch.set_num_threads(1)
    gc.freeze()  # or every collection walks through all that the server has imported
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        send.send((function(*args), None))
    except BaseException as error:
        traceback.print_exc()
        send.send((None, f'{type(error).__name__}: {error}'))


def stock_config(work_dir: Path, **changes: Any) -> dict[str, Any]:
    """A plain mmpretrain run: 4 epochs of 6 iterations on digits, a ResNet of a few channels.

    Args:
        work_dir: Where the run writes.
        changes: What differs, merged into the dictionaries they name.
    """
    train = dict(
        batch_size=16,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
        dataset=dict(type='mmsmart.Digits', split='train', indices=96, pipeline=pipeline()),
    )
    val = copy.deepcopy(train)
    val['batch_size'] = 75
    val['sampler']['shuffle'] = False
    val['dataset'].update(split='test', indices=150)
    config = dict(
        default_scope='mmpretrain',
        work_dir=str(work_dir),
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(
                type='ClsDataPreprocessor', num_classes=10, mean=[77.0] * 3, std=[95.0] * 3
            ),
            backbone=dict(
                type='ResNet', depth=18, stem_channels=8, base_channels=8, out_indices=(3,)
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=10,
                in_channels=64,
                loss=dict(type='CrossEntropyLoss'),
            ),
        ),
        train_dataloader=train,
        val_dataloader=val,
        test_dataloader=copy.deepcopy(val),
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        test_evaluator=dict(type='Accuracy', topk=(1,)),
        train_cfg=dict(by_epoch=True, max_epochs=4, val_interval=1),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-3),
        ),
        param_scheduler=dict(
            type='CosineAnnealingLR', by_epoch=True, T_max=4, convert_to_iter_based=True
        ),
        default_hooks=dict(
            timer=dict(type='IterTimerHook'),
            logger=dict(type='LoggerHook', interval=1),
            param_scheduler=dict(type='ParamSchedulerHook'),
            checkpoint=dict(type='CheckpointHook', interval=1),
            sampler_seed=dict(type='DistSamplerSeedHook'),
        ),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        log_processor=dict(window_size=1),
        visualizer=dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
        custom_hooks=[],
        randomness=dict(seed=0),
    )
    return merged(config, changes)


def smart_config(work_dir: Path, smart: dict[str, Any] | None = None, **changes: Any) -> dict:
    """:func:`stock_config` with pruning: search over iterations 6 to 18, blocks of 4x4 at 75 %."""
    defaults = dict(
        sparsity=0.75,
        block=(4, 4, 1, 1),
        stages=dict(pretrain=0.25, search=0.5, finetune=0.25),
        importance=dict(batches=2),
    )
    config = stock_config(work_dir, **changes)
    config.update(runner_type='mmsmart.SmartRunner', smart=merged(defaults, smart or {}))
    return config


def iteration_based(config: dict[str, Any], **sampler: Any) -> dict[str, Any]:
    """The same run of 24 iterations in a loop that counts iterations, a checkpoint every 3."""
    config = copy.deepcopy(config)
    config['train_cfg'] = dict(by_epoch=False, max_iters=24, val_interval=6)
    config['train_dataloader']['sampler'].update(sampler)
    config['default_hooks']['checkpoint'].update(by_epoch=False, interval=3)
    config['log_processor'].update(by_epoch=False)
    config['param_scheduler'] = dict(type='CosineAnnealingLR', by_epoch=False, T_max=24)
    return config


def pipeline(*augmentations: dict[str, Any]) -> list[dict[str, Any]]:
    return [*augmentations, dict(type='Resize', scale=16), dict(type='PackInputs')]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries inside dictionaries are merged, everything else is replaced."""
    base = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        base[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return base


def train(config: dict[str, Any], kill_at: int | None = None, resume: bool = False) -> Outcome:
    """Train in a process of its own; the outcome's value is what the witness noted."""
    config = copy.deepcopy(config)
    config['resume'] = resume
    config['custom_hooks'] = [*config['custom_hooks'], dict(type='Witness')]
    if kill_at is not None:
        config['custom_hooks'].append(dict(type='Sigkill', at=kill_at))
    Path(config['work_dir']).mkdir(parents=True, exist_ok=True)
    return apart(train_here, config, log=Path(config['work_dir']) / 'stdout.txt')


def train_here(config: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stock `tools/train.py` does once the config is read."""
    importlib.import_module('engine.probes')
    pruning_hook = importlib.import_module('mmsmart.engine.pruning_hook')
    pruning_hook.draw_report = lambda *args: None  # takes longer than the run
    pruning_hook.show_masks = lambda *args: None  # and so does this
    from mmengine.config import Config
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    config = Config(config)
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    runner.train()
    return next(hook.notes for hook in runner.hooks if type(hook).__name__ == 'Witness')


def run_tool(path: Path, *arguments: str | Path) -> None:
    """Run a stock tool in this process as if from the command line."""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name='__main__')


def run_tool_undrawn(path: Path, *arguments: str | Path) -> None:
    """:func:`run_tool`, with an empty file for `pruning.png`, which takes longer than the run."""
    figure = importlib.import_module('matplotlib.figure')
    figure.Figure.savefig = lambda self, path, **settings: Path(path).touch()
    run_tool(path, *arguments)


def run_tool_mixed(path: Path, *arguments: str | Path) -> None:
    """:func:`run_tool_undrawn` with `--amp`, on a machine that pretends to have a GPU."""
    import torch

    amp = importlib.import_module('mmengine.optim.optimizer.amp_optimizer_wrapper')
    amp.is_cuda_available = lambda: True
    amp.GradScaler = functools.partial(torch.amp.GradScaler, device='cpu')
    run_tool_undrawn(path, *arguments, '--amp')


def scored_by_stock_tool(scope: str, config: Path, weights: Path, work_dir: Path, *arguments: str):
    """Metrics of a checkpoint by `tools/test.py`, in a process that can't import mmsmart.

    The checkpoint also has to fit the stock model with `strict=True`.
    """
    sys.modules['mmsmart'] = None  # an import of it is an error from here on
    metrics = scored(scope, config, weights, work_dir, *arguments)
    strictly_loaded(config, weights)
    loaded = [name for name, module in sys.modules.items() if module]
    assert not [name for name in loaded if name.partition('.')[0] == 'mmsmart']
    return metrics


def scored(scope: str, config: Path, weights: Path, work_dir: Path, *arguments: str) -> dict:
    """Metrics of a checkpoint by the stock `tools/test.py`."""
    run_tool(stock_tool('test.py', scope), config, weights, '--work-dir', work_dir, *arguments)
    (file,) = work_dir.glob('*/*.json')
    metrics = json.loads(file.read_text())
    return {key: value for key, value in metrics.items() if key not in ('time', 'data_time')}


def strictly_loaded(config: Path, weights: Path) -> None:
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS

    model = MODELS.build(Config.fromfile(config).model)
    model.load_state_dict(torch.load(weights, weights_only=True)['state_dict'], strict=True)


def pruned_weights(work_dir: Path) -> dict[str, Any]:
    import torch

    return torch.load(work_dir / 'pruned.pth', weights_only=True)['state_dict']


def report(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / 'pruning.json').read_text())


def with_parts(config: dict[str, Any]) -> dict[str, Any]:
    """The same pruning run for the stock runner, its three parts named one by one."""
    config = copy.deepcopy(config)
    smart = config.pop('smart')
    del config['runner_type']
    importance = smart['importance']
    config['model'] = dict(
        type='mmsmart.SmartClassifier',
        model=config['model'],
        sparsity=smart['sparsity'],
        block=smart['block'],
    )
    config['optim_wrapper']['type'] = 'mmsmart.SmartOptimWrapper'
    hook = dict(type='mmsmart.SmartPruningHook', stages=smart['stages'], importance=importance)
    config['custom_hooks'].append(hook)
    return config


def write_config(path: Path, config: dict[str, Any], bases: Sequence[Path] = ()) -> Path:
    """Write a config file as a user would."""
    lines = [f'_base_ = {[str(base) for base in bases]}'] if bases else []
    path.write_text('\n'.join([*lines, *(f'{key} = {value!r}' for key, value in config.items())]))
    return path


def stock_tool(name: str, scope: str = 'mmpretrain') -> Path:
    """A tool of a toolbox, as it was installed."""
    return Path(importlib.util.find_spec(scope).origin).parent / '.mim/tools' / name


def assert_same_end(one: Path, other: Path) -> None:
    """Masks, weights and figures of two runs agree bit for bit."""
    first, second = pruned_weights(one), pruned_weights(other)
    assert first.keys() == second.keys()
    differing = [key for key in first if not bool((first[key] == second[key]).all())]
    assert not differing
    assert report(one) == report(other)


def nonzero_masks(state: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the pruned layers of a state dict are not zero, by name."""
    return {row['name']: state[f'{row["name"]}.weight'] != 0 for row in rows}


def assert_on_budget(work_dir: Path) -> None:
    """The figures meet the budget, and the checkpoint holds as many weights as they say."""
    figures = report(work_dir)
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']
    masks = nonzero_masks(pruned_weights(work_dir), figures['layers'])
    for row in figures['layers']:
        kept = int(masks[row['name']].sum())
        # Offsets of deformable convolutions start from zero, and what is kept may still be there.
        from_zero = row['name'].endswith('conv_offset') and kept < row['params_kept']
        assert kept == row['params_kept'] or from_zero, row['name']
    assert sum(row['params_kept'] for row in figures['layers']) == figures['kept']


def assert_finished(function: Callable[..., Any], *args: Any, log: Path) -> Outcome:
    """:func:`apart`, for what has to end well."""
    outcome = apart(function, *args, log=log)
    assert outcome.error is None and outcome.exitcode == 0, outcome.log[-3000:]
    return outcome


def assert_nothing_written(work_dir: Path) -> None:
    assert not [path.name for path in work_dir.rglob('prun*')]
    assert not list(work_dir.rglob('.prun*'))
