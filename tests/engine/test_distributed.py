"""Two processes with half a batch each search like one process with the whole batch."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

from engine.runs import begun, finished, merged, report, smart_config, train_here

# Running statistics are those of a batch, of which each process sees a half.
FROZEN_STATISTICS = dict(model=dict(backbone=dict(norm_eval=True)))
CHECKPOINTED = dict(model=dict(backbone=dict(with_cp=True)))
UNUSED_PARAMETERS = dict(model_wrapper_cfg=dict(find_unused_parameters=True))
ACCUMULATION = dict(optim_wrapper=dict(accumulative_counts=2))
# MMEngine would ask for GPUs by their numbers.
ON_CPU = dict(
    model_wrapper_cfg=dict(
        type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
    )
)
DOUBLE = dict(model=dict(data_preprocessor=dict(type='DoublePreprocessor')))


def run_of(work_dir: Path, batch_size: int, *features: dict) -> dict:
    """A search of 20 iterations from the first to the last, then 4 of fine-tuning."""
    stages = dict(pretrain=0.0, search=5 / 6, finetune=1 / 6)
    importance = dict(init='magnitude')
    config = smart_config(work_dir, dict(stages=stages, importance=importance))
    for feature in (FROZEN_STATISTICS, ON_CPU, DOUBLE, *features):
        config = merged(config, feature)
    config['train_dataloader']['batch_size'] = batch_size
    config['custom_hooks'] = [dict(type='Witness')]
    return config


def rank_of(config: dict, rank: int, world: int, rendezvous: Path) -> tuple[list, dict]:
    """Train in this process as one of several."""
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    if world > 1:
        os.environ['LOCAL_RANK'] = str(rank)
        dist.init_process_group(
            'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=world
        )
        config['launcher'] = 'pytorch'
    return train_here(config)


def train_on(world: int, config: dict) -> list[list[dict]]:
    """What every process noted."""
    work_dir = Path(config['work_dir'])
    work_dir.mkdir(parents=True, exist_ok=True)
    started = [
        begun(
            rank_of, copy.deepcopy(config), rank, world, work_dir / 'rendezvous',
            log=work_dir / f'log{rank}.txt',
        )
        for rank in range(world)
    ]  # fmt: skip
    outcomes = [finished(*process) for process in started]
    for outcome in outcomes:
        assert outcome.error is None and outcome.exitcode == 0, outcome.log
    return [outcome.value for outcome in outcomes]


def weights_of(work_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(work_dir / 'pruned.pth', weights_only=True)['state_dict']


@pytest.mark.parametrize(
    'features',
    [
        pytest.param([], id='plain'),
        pytest.param([ACCUMULATION, UNUSED_PARAMETERS], id='accumulated, unused parameters'),
        pytest.param([CHECKPOINTED], id='checkpointed segments'),
        pytest.param([CHECKPOINTED, ACCUMULATION], id='checkpointed segments, accumulated'),
    ],
)
def test_two_processes_search_like_one(tmp_path, features):
    (alone,) = train_on(1, run_of(tmp_path / 'one', 16, *features))
    first, second = train_on(2, run_of(tmp_path / 'two', 8, *features))
    assert len(alone) == len(first) == 24
    for one, left, right in zip(alone, first, second):
        assert one['labels'] == sorted(left['labels'] + right['labels'])
        assert left['mask'] == right['mask']
        assert left['hard'] == one['hard']
        # The importance is in float32 whatever the model is in.
        assert left['mask'] == pytest.approx(one['mask'], abs=1e-5)
        assert (left['loss'] + right['loss']) / 2 == pytest.approx(one['loss'], rel=1e-6)
    assert alone[0]['hard'] != alone[-1]['hard']
    expected = weights_of(tmp_path / 'one')
    for key, weight in weights_of(tmp_path / 'two').items():
        assert weight.dtype == expected[key].dtype
        assert torch.equal(weight == 0, expected[key] == 0)
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-7)


def test_two_processes_agree_on_an_importance_from_activations(tmp_path):
    config = run_of(tmp_path, 8)
    config['smart']['importance']['init'] = 'activation'
    first, second = train_on(2, config)
    assert [note['mask'] for note in first] == [note['mask'] for note in second]
    assert set(first[0]['labels']) and first[0]['data'] != second[0]['data']
    figures = report(tmp_path)
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']
