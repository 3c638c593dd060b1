"""What a run can be combined with: the table of docs/reliability.md, cell by cell.

Every run searches over iterations 6 to 18 of 24, blocks of 4x4 at 75 %, as those of `engine.runs`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.ranks import outcomes_on, train_on
from engine.runs import (
    assert_on_budget,
    iteration_based,
    pruned_weights,
    report,
    smart_config,
)

LENGTH = 24
LAYERS = ['backbone.layer1', 'backbone.layer3']


@dataclass
class Feature:
    """What the config of a run gets, and how one sees afterwards that it was in effect."""

    changes: dict[str, Any] = field(default_factory=dict)
    seen: Callable[[Path, list[dict]], bool] = lambda work_dir, notes: True
    whole: Callable[[dict], dict] = lambda config: config
    ends_at: int = LENGTH


def averaged(kind: str, **settings: Any) -> Feature:
    hook = dict(type='EMAHook', ema_type=kind, **settings)

    def average_is_pruned(work_dir: Path, notes: list[dict]) -> bool:
        state, written = last_checkpoint(work_dir)['ema_state_dict'], pruned_weights(work_dir)
        keys = [f'{row["name"]}.weight' for row in report(work_dir)['layers']]
        return all(torch.equal(state[f'module.{key}'] == 0, written[key] == 0) for key in keys)

    return Feature(dict(custom_hooks=[hook]), average_is_pruned)


def wrapped(**settings: Any) -> Feature:
    return Feature(dict(model_wrapper_cfg=settings))


def in_32_pixels(config: dict[str, Any]) -> dict[str, Any]:
    """No strided 3x3 convolution over a map of one pixel.

    Of its weight torch 2.11 gives, in bfloat16 on a CPU, a gradient out of memory that nothing was
    written to, masks or not.
    """
    for part in ('train', 'val', 'test'):
        config[f'{part}_dataloader']['dataset']['pipeline'][0]['scale'] = 32
    return config


def last_checkpoint(work_dir: Path) -> dict[str, Any]:
    name = (work_dir / 'last_checkpoint').read_text()
    return torch.load(name, weights_only=False)


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def masks_move_every_second_step(work_dir: Path, notes: list[dict]) -> bool:
    soft = [note for note in notes if note['state'] == 'soft']
    moved = [one['mask'] != other['mask'] for one, other in itertools.pairwise(soft)]
    return moved == ([False, True] * 6)[:11]


def validated_at(*iterations: int) -> Callable[[Path, list[dict]], bool]:
    def seen(work_dir: Path, notes: list[dict]) -> bool:
        return [x['step'] for x in scalars(work_dir) if 'accuracy/top1' in x] == list(iterations)

    return seen


AMP = dict(type='AmpOptimWrapper')
FEATURES = {
    'epochs': Feature(),
    'iterations': Feature(whole=lambda config: iteration_based(config, type='InfiniteSampler')),
    'accumulated gradients': Feature(
        dict(optim_wrapper=dict(accumulative_counts=2)), masks_move_every_second_step
    ),
    'clipped gradients': Feature(
        dict(optim_wrapper=dict(clip_grad=dict(max_norm=0.5))),
        lambda work_dir, notes: any('grad_norm' in line for line in scalars(work_dir)),
    ),
    'unused parameters': Feature(
        dict(model=dict(neck=dict(type='IdleNeck')), find_unused_parameters=True),
        lambda work_dir, notes: 'neck.idle.weight' in pruned_weights(work_dir),
    ),
    'static graph': wrapped(static_graph=True),
    'broadcast buffers': wrapped(broadcast_buffers=True),
    'sync_bn': Feature(dict(sync_bn='torch')),
    'fp16, loss scaling': Feature(
        dict(optim_wrapper=dict(**AMP, dtype='float16', loss_scale='dynamic')),
        lambda work_dir, notes: 'loss_scaler' in last_checkpoint(work_dir)['optimizer'],
    ),
    'bf16': Feature(
        dict(optim_wrapper=dict(**AMP, dtype='bfloat16', loss_scale=1.0)),
        lambda work_dir, notes: 'loss_scaler' in last_checkpoint(work_dir)['optimizer'],
        whole=in_32_pixels,
    ),
    'EMA': averaged('ExponentialMovingAverage', momentum=0.1),
    'EMA, annealed': averaged('MomentumAnnealingEMA', gamma=10, momentum=0.1, update_buffers=True),
    'EMA of mmdet': averaged('mmdet.ExpMomentumEMA', gamma=10, momentum=0.1),
    'SWA': averaged('StochasticWeightAverage', begin_iter=18),
    'torch.compile': Feature(dict(compile=dict(backend='eager'))),
    'torch.compile, inductor': Feature(dict(compile=True)),
    'checkpointing, reentrant': Feature(dict(activation_checkpointing=LAYERS)),
    'checkpointing, not reentrant': Feature(
        dict(custom_hooks=[dict(type='Recomputing', modules=LAYERS)])
    ),
    'early stopping': Feature(
        dict(
            custom_hooks=[
                dict(type='EarlyStoppingHook', monitor='accuracy/top1', patience=1, min_delta=200.0)
            ],
            train_cfg=dict(max_epochs=8, val_begin=5),
            smart=dict(stages=dict(pretrain=0.125, search=0.25, finetune=0.625)),
        ),
        ends_at=36,
    ),
    'auto_scale_lr': Feature(
        dict(auto_scale_lr=dict(enable=True, base_batch_size=8)),
        lambda work_dir, notes: notes[0]['lr'] > 0.02,
    ),
    'validation inside stages': Feature(
        dict(
            train_cfg=dict(val_interval=4),
            default_hooks=dict(logger=dict(log_metric_by_epoch=False)),
        ),
        validated_at(4, 6, 8, 12, 16, 20, 24),
        lambda config: iteration_based(config, type='InfiniteSampler'),
    ),
    'dynamic intervals': Feature(
        dict(train_cfg=dict(val_interval=4, dynamic_intervals=[(2, 1)])), validated_at(1, 2, 3, 4)
    ),
    'channels': Feature(dict(smart=dict(block='channel', sparsity=0.5))),
}


def config_of(work_dir: Path, name: str) -> dict[str, Any]:
    feature = FEATURES[name]
    changes = dict(feature.changes)
    config = smart_config(work_dir, changes.pop('smart', None), **changes)
    interval = config['train_cfg']['val_interval']
    config = feature.whole(config)
    if 'max_iters' in config['train_cfg']:
        config['train_cfg']['val_interval'] = 6 if interval == 1 else interval
    return config


def assert_pruned(work_dir: Path, name: str, notes: list[list[dict]]) -> None:
    """The budget is met, the ranks agreed at every step, and the feature was in effect."""
    first, *others = notes
    assert len(first) == FEATURES[name].ends_at
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert (one['mask'], one['state']) == (two['mask'], two['state']), one['iter']
            assert one['data'] != two['data']
    states = [note['state'] for note in first]
    assert states == sorted(states, key=('dense', 'soft', 'hard').index)
    assert {'dense', 'soft', 'hard'} == set(states)
    if 'groups' not in report(work_dir):
        assert_on_budget(work_dir)
    figures = report(work_dir)
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']
    assert FEATURES[name].seen(work_dir, first)


def cells(hows: Sequence[int | str], every_day: dict[str, Sequence[int | str]]) -> list[Any]:
    """Every feature with every how; those that are not for every day are slow."""
    return [
        pytest.param(
            name, how, id=f'{name}-{how}', marks=() if how in every_day.get(name, ()) else SLOW
        )
        for name in FEATURES
        for how in hows
    ]


SLOW = pytest.mark.slow
IN_PROCESSES = {
    'epochs': [4],
    'clipped gradients': [2],
    'unused parameters': [1, 2],
    'static graph': [2],
    'broadcast buffers': [2],
    'sync_bn': [2],
    'fp16, loss scaling': [2],
    'EMA, annealed': [2],
    'SWA': [1],
    'checkpointing, reentrant': [2],
    'checkpointing, not reentrant': [1],
    'auto_scale_lr': [2],
    'validation inside stages': [1],
    'dynamic intervals': [2],
    'channels': [2],
}


@pytest.mark.parametrize(('name', 'world'), cells([1, 2, 4], IN_PROCESSES))
def test_masks_meet_the_budget_in_every_process(tmp_path, name, world):
    config = config_of(tmp_path, name)
    config['train_dataloader']['batch_size'] //= world
    assert_pruned(tmp_path, name, train_on(world, config))


@pytest.mark.parametrize(('name', 'world'), cells([1, 2], {'iterations': [2], 'channels': [2]}))
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, name, world):
    through, killed = (config_of(tmp_path / part, name) for part in ('through', 'killed'))
    for config in (through, killed):
        config['train_dataloader']['batch_size'] //= world
    train_on(world, through)
    deaths = [
        outcome.exitcode for outcome in outcomes_on(world, killed, dict.fromkeys(range(world), 15))
    ]
    assert -9 in deaths  # the others may have missed it before their turn
    train_on(world, killed, resume=True)
    assert_same_pruning(tmp_path / 'through', tmp_path / 'killed')
    figures = report(tmp_path / 'killed')
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']


def assert_same_pruning(one: Path, other: Path) -> None:
    """Masks, weights and figures agree bit for bit; metrics may not.

    Each process validates with statistics of its batch norms that are its own, and after a resume
    are those of the first.
    """
    first, second = pruned_weights(one), pruned_weights(other)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    mine, theirs = report(one), report(other)
    for figures in (mine, theirs):
        for kind in ('dense', 'pruned'):
            del figures[kind]['accuracy/top1']
    assert mine == theirs


@pytest.mark.slow
@pytest.mark.parametrize('name', ['torch.compile', 'torch.compile, inductor'])
def test_a_compiled_run_prunes_like_the_plain_one(tmp_path, name):
    (plain,) = train_on(1, config_of(tmp_path / 'plain', 'epochs'))
    (compiled,) = train_on(1, config_of(tmp_path / 'compiled', name))
    for one, other in zip(plain, compiled, strict=True):
        assert other['loss'] == pytest.approx(one['loss'], rel=1e-3), one['iter']
        if one['state'] == 'soft':
            assert other['mask'] == pytest.approx(one['mask'], abs=0.05)
