"""Several processes with a part of each batch search like one process with the whole batch.

In float64, where sums in another order are no other sums.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.ranks import in_double, outcomes_on, train_on
from engine.runs import (
    begun,
    finished,
    iteration_based,
    merged,
    pruned_weights,
    report,
    smart_config,
)
from mmsmart import install_masks

# Running statistics are those of a batch, of which each process sees a part.
FROZEN_STATISTICS = dict(model=dict(backbone=dict(norm_eval=True)))
SYNCHRONISED = dict(sync_bn='torch')
CHECKPOINTED = dict(model=dict(backbone=dict(with_cp=True)))
UNUSED_PARAMETERS = dict(find_unused_parameters=True)
ACCUMULATION = dict(optim_wrapper=dict(accumulative_counts=2))
CLIPPED = dict(optim_wrapper=dict(clip_grad=dict(max_norm=0.5)))


def run_of(work_dir: Path, batch_size: int, *features: dict) -> dict:
    """A search of 20 iterations from the first to the last, then 4 of fine-tuning."""
    stages = dict(pretrain=0.0, search=5 / 6, finetune=1 / 6)
    importance = dict(init='gradient', batches=2)
    config = smart_config(work_dir, dict(stages=stages, importance=importance))
    for feature in features:
        config = merged(config, feature)
    config['train_dataloader']['batch_size'] = batch_size
    return in_double(config)


def assert_same_search(alone: list[dict], ranks: list[list[dict]], one: Path, many: Path) -> None:
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole['labels'] == sorted(label for part in parts for label in part['labels'])
        assert all(part['mask'] == parts[0]['mask'] for part in parts)
        assert parts[0]['hard'] == whole['hard']
        # The importance is in float32 whatever the model is in.
        assert parts[0]['mask'] == pytest.approx(whole['mask'], abs=1e-5)
        mean = sum(part['loss'] for part in parts) / len(parts)
        assert mean == pytest.approx(whole['loss'], rel=1e-6)
    assert alone[0]['hard'] != alone[-1]['hard']
    assert_same_weights(one, many)


def assert_same_weights(one: Path, many: Path) -> None:
    expected = pruned_weights(one)
    for key, weight in pruned_weights(many).items():
        assert weight.dtype == expected[key].dtype
        assert torch.equal(weight == 0, expected[key] == 0)
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    'features',
    [
        pytest.param([FROZEN_STATISTICS, CLIPPED], id='clipped'),
        pytest.param([SYNCHRONISED], id='synchronised statistics'),
        pytest.param(
            [FROZEN_STATISTICS, ACCUMULATION, UNUSED_PARAMETERS],
            id='accumulated, unused parameters',
        ),
        pytest.param(
            [FROZEN_STATISTICS, CHECKPOINTED, ACCUMULATION], id='checkpointed segments, accumulated'
        ),
    ],
)
def test_two_processes_search_like_one(tmp_path, features):
    (alone,) = train_on(1, run_of(tmp_path / 'one', 16, *features))
    ranks = train_on(2, run_of(tmp_path / 'two', 8, *features))
    assert_same_search(alone, ranks, tmp_path / 'one', tmp_path / 'two')


@pytest.mark.slow
@pytest.mark.parametrize('world', [2, 4])
def test_two_hundred_steps_of_several_processes_are_those_of_one(tmp_path, world):
    def run(folder: Path, batch_size: int) -> dict:
        config = run_of(folder, batch_size, FROZEN_STATISTICS)
        config = iteration_based(config, type='InfiniteSampler')
        config['train_cfg'].update(max_iters=204, val_interval=204)
        config['param_scheduler'].update(T_max=204)
        config['smart']['stages'] = dict(pretrain=0.0, search=200 / 204, finetune=4 / 204)
        return config

    (alone,) = train_on(1, run(tmp_path / 'one', 8))
    ranks = train_on(world, run(tmp_path / 'many', 8 // world))
    assert [note['state'] for note in alone].count('soft') == 200
    assert_same_search(alone, ranks, tmp_path / 'one', tmp_path / 'many')


@pytest.mark.parametrize(
    ('before', 'after'),
    [(1, 2), (2, 1), pytest.param(2, 4, marks=pytest.mark.slow)],
    ids=lambda world: str(world),
)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    """With as many images a step, its end is that of a run by one process."""
    runs = {
        world: run_of(tmp_path / 'changed', 16 // world, FROZEN_STATISTICS)
        for world in (before, after)
    }
    outcomes_on(before, runs[before], kills=dict.fromkeys(range(before), 15))
    resumed = train_on(after, runs[after], resume=True)
    assert len(resumed[0]) == 12 and resumed[0][0]['state'] == 'soft'
    train_on(1, run_of(tmp_path / 'whole', 16, FROZEN_STATISTICS))
    assert_same_weights(tmp_path / 'whole', tmp_path / 'changed')


def test_a_search_that_would_change_its_length_is_not_gone_on_with(tmp_path):
    config = run_of(tmp_path, 16)
    outcomes_on(1, config, kills={0: 15})
    first, second = outcomes_on(2, config, resume=True)
    for outcome in (first, second):
        assert outcome.error.startswith('ValueError: resume: '), outcome.log
        assert '0 to 20' in outcome.error and '0 to 10' in outcome.error
        assert 'train_dataloader.batch_size' in outcome.error


def test_two_processes_agree_on_an_importance_from_activations(tmp_path):
    config = run_of(tmp_path, 8, FROZEN_STATISTICS)
    config['smart']['importance']['init'] = 'activation'
    first, second = train_on(2, config)
    assert [note['mask'] for note in first] == [note['mask'] for note in second]
    assert set(first[0]['labels']) and first[0]['data'] != second[0]['data']
    figures = report(tmp_path)
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']


def agreed(rank: int, rendezvous: Path, odd: dict | None) -> str:
    """What the comparison of two processes says, one of whose masks may be odd."""
    from mmsmart.engine.processes import expect_agreement

    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=2
    )
    model = torch.nn.Linear(8, 8)
    masks = install_masks(model, sparsity=0.5, block=(2, 2))
    importance = torch.arange(float(masks.num_blocks))
    temperature = 1.0
    if rank == 1 and odd is not None:
        importance, temperature = odd.get('importance', importance), odd.get('temperature', 1.0)
    masks.begin(importance, temperature)
    try:
        expect_agreement(masks, 'now')
    except RuntimeError as error:
        return str(error)
    return ''


@pytest.mark.parametrize(
    ('odd', 'what'),
    [
        (None, None),
        (dict(temperature=1.0 + 1e-15), 'temperature'),
        (dict(importance=torch.arange(16.0).flip(0)), 'importance and mask'),
        (dict(importance=torch.arange(16.0) + 1e-6), 'importance'),
    ],
    ids=['the same', 'temperature', 'order', 'last bit'],
)
def test_a_process_with_other_masks_is_found_by_all(tmp_path, odd, what):
    started = [begun(agreed, rank, tmp_path / 'rendezvous', odd) for rank in (0, 1)]
    outcomes = [finished(*process) for process in started]
    for outcome in outcomes:
        assert outcome.error is None
        if what is None:
            assert outcome.value == ''
        else:
            assert f'rank 1 has another {what}' in outcome.value
