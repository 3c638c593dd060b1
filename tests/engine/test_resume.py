"""A run that is killed and resumed ends bit for bit like one that ran through.

The runs here have 24 iterations, 6 an epoch; the search takes iterations 6 to 18.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest
from mmengine.runner import IterBasedTrainLoop

from engine.runs import assert_same_end, iteration_based, merged, pipeline, smart_config, train

DROPOUT = dict(model=dict(backbone=dict(drop_path_rate=0.3)))
SAVE_BEST = dict(default_hooks=dict(checkpoint=dict(save_best='accuracy/top1')))
EMA = dict(custom_hooks=[dict(type='EMAHook', momentum=0.1, begin_iter=8)])
EMA_OF_BUFFERS = dict(custom_hooks=[dict(type='EMAHook', momentum=0.1, update_buffers=True)])
ACCUMULATION = dict(optim_wrapper=dict(accumulative_counts=2))
WORKERS = dict(train_dataloader=dict(num_workers=2), val_dataloader=dict(num_workers=1))
PERSISTENT_WORKERS = dict(train_dataloader=dict(num_workers=2, persistent_workers=True))
NOISY_STEPS = pipeline(*(dict(type='Noise', source=s) for s in ('python', 'numpy', 'torch')))
NOISE = dict(train_dataloader=dict(dataset=dict(pipeline=NOISY_STEPS)))
NOISE_IN_VALIDATION = dict(val_dataloader=dict(dataset=dict(pipeline=NOISY_STEPS)))


def run_of(tmp_path: Path, *features: dict) -> dict:
    return smart_config(tmp_path, **reduce(merged, features, {}))


def assert_resumes(tmp_path: Path, config: dict, *kills: int) -> None:
    """Run through once; be killed before each of these iterations in turn, and end the same."""
    through = merged(config, dict(work_dir=str(tmp_path / 'through')))
    killed = merged(config, dict(work_dir=str(tmp_path / 'killed')))
    undisturbed = train(through)
    assert undisturbed.error is None and undisturbed.exitcode == 0, undisturbed.log
    for count, kill in enumerate(kills):
        outcome = train(killed, kill_at=kill, resume=count > 0)
        assert outcome.exitcode == -9, outcome.log
    resumed = train(killed, resume=True)
    assert resumed.error is None and resumed.exitcode == 0, resumed.log
    assert resumed.value == undisturbed.value[len(undisturbed.value) - len(resumed.value) :]
    assert_same_end(tmp_path / 'through', tmp_path / 'killed')


def test_epochs_resume_in_every_stage_and_at_its_borders(tmp_path):
    before_any_checkpoint, search_begins, in_search, search_ends, in_finetune, files_due = (
        3, 6, 15, 18, 21, 24
    )  # fmt: skip
    config = run_of(tmp_path, DROPOUT, NOISE, SAVE_BEST)
    assert_resumes(
        tmp_path, config,
        before_any_checkpoint, search_begins, in_search, search_ends, in_finetune, files_due,
    )  # fmt: skip


def test_iterations_resume_in_every_stage_and_at_its_borders(tmp_path):
    pretrain, search_begins, in_search, search_ends, in_finetune, files_due = (
        4, 6, 11, 18, 22, 24
    )  # fmt: skip
    # Loops that load all data again, up to where the run was, draw its noise again too.
    noise = [NOISE] if hasattr(IterBasedTrainLoop, 'fast_forward_on_resume') else []
    config = iteration_based(run_of(tmp_path, DROPOUT, *noise, EMA), type='InfiniteSampler')
    assert_resumes(
        tmp_path, config, pretrain, search_begins, in_search, search_ends, in_finetune, files_due
    )


def test_averages_accumulated_gradients_and_random_validation_resume(tmp_path):
    features = DROPOUT, NOISE, NOISE_IN_VALIDATION, SAVE_BEST, EMA_OF_BUFFERS, ACCUMULATION
    assert_resumes(tmp_path, run_of(tmp_path, *features), 15, 21)


def test_workers_of_one_epoch_resume(tmp_path):
    assert_resumes(tmp_path, run_of(tmp_path, WORKERS, NOISE, DROPOUT), 10, 21)


def test_persistent_workers_resume_where_they_draw_nothing(tmp_path):
    assert_resumes(tmp_path, run_of(tmp_path, PERSISTENT_WORKERS, DROPOUT), 15)


RIVALS = {
    'magnitude': dict(),
    'taylor': dict(interval=4),
    'agp': dict(interval=2),
    'acdc': dict(phases=4),
    'pdp': dict(),
    'movement': dict(),
    'sequential_attention': dict(cycles=1),
}


@pytest.mark.parametrize('method', RIVALS)
def test_rival_resumes(tmp_path, method):
    smart = dict(method=method, method_cfg=RIVALS[method])
    assert_resumes(tmp_path, smart_config(tmp_path, smart, **DROPOUT), 15)


@pytest.mark.slow  # MMEngine sleeps two seconds whenever such a loop comes to the end of its data
def test_iterations_over_a_finite_sampler_resume(tmp_path):
    config = iteration_based(run_of(tmp_path, WORKERS, NOISE, DROPOUT))
    assert_resumes(tmp_path, config, 11, 16)
