"""Runs of several processes on one machine, as `tools/dist_train.sh` starts them, but warm."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path
from typing import Any

from engine.runs import Outcome, begun, finished, merged, train_here


def outcomes_on(
    world: int, config: dict[str, Any], kills: dict[int, int] | None = None, resume: bool = False
) -> list[Outcome]:
    """Train with this many processes; each outcome's value is what its witness noted.

    Args:
        world: Number of processes.
        config: The config of the run.
        kills: By rank, the iteration before which it is killed.
        resume: Whether to go on from the last checkpoint.
    """
    work_dir = Path(config['work_dir'])
    work_dir.mkdir(parents=True, exist_ok=True)
    rendezvous = work_dir / f'rendezvous{len(list(work_dir.glob("rendezvous*")))}'
    started = []
    for rank in range(world):
        mine = copy.deepcopy(config)
        mine['resume'] = resume
        mine['custom_hooks'] = [*mine['custom_hooks'], dict(type='Witness')]
        if kills and rank in kills:
            mine['custom_hooks'].append(dict(type='Sigkill', at=kills[rank]))
        log = work_dir / f'log{rank}.txt'
        started.append(begun(rank_of, mine, rank, world, rendezvous, log=log))
    return [finished(*process) for process in started]


def train(config: dict[str, Any], kill_at: int | None = None, resume: bool = False) -> Outcome:
    """As that of `engine.runs`, with the parts of `engine.matrix_parts` known."""
    (outcome,) = outcomes_on(1, config, {0: kill_at} if kill_at is not None else None, resume)
    return outcome


def train_on(world: int, config: dict[str, Any], resume: bool = False) -> list[list[dict]]:
    """What every process noted of a run that has to succeed."""
    outcomes = outcomes_on(world, config, resume=resume)
    for outcome in outcomes:
        assert outcome.error is None and outcome.exitcode == 0, outcome.log
    return [outcome.value for outcome in outcomes]


def rank_of(config: dict, rank: int, world: int, rendezvous: Path) -> list[dict]:
    """Train in this process as one of several."""
    import torch

    parts = importlib.import_module('engine.matrix_parts')
    if config.pop('in_double', False):
        torch.set_default_dtype(torch.float64)
    if config['optim_wrapper']['type'] == 'AmpOptimWrapper':
        parts.pretend_to_have_a_gpu()
    if config.get('sync_bn') and world > 1:
        parts.let_cpus_synchronise_statistics()
    if world > 1:
        os.environ['LOCAL_RANK'] = str(rank)
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=world
        )
        config['launcher'] = 'pytorch'
    return train_here(config)


def in_double(config: dict[str, Any]) -> dict[str, Any]:
    """The same run in float64, where sums in another order are no other sums."""
    double = dict(data_preprocessor=dict(type='DoublePreprocessor'))
    return {**merged(config, dict(model=double)), 'in_double': True}
