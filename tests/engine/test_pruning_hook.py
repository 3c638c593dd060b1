"""What happens when: stages, temperature, logs, averages, validations and files."""

from __future__ import annotations

import json

import pytest
import torch

from engine.runs import (
    assert_nothing_written,
    merged,
    pipeline,
    pruned_weights,
    report,
    smart_config,
    train,
)
from mmsmart.functional import TemperatureSchedule

EARLY_STOP = dict(type='EarlyStoppingHook', monitor='accuracy/top1', patience=1, min_delta=200.0)


def run(config, **kwargs):
    outcome = train(config, **kwargs)
    assert outcome.error is None and outcome.exitcode == 0, outcome.log
    return outcome


def scalars(work_dir):
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def pruned_masks(state, rows):
    return {row['name']: state[f'{row["name"]}.weight'] == 0 for row in rows}


def assert_pruned_like(work_dir, checkpoint, keys=('state_dict',)):
    """Every state dict of the checkpoint is exactly zero wherever pruned.pth is."""
    rows = report(work_dir)['layers']
    wanted = pruned_masks(pruned_weights(work_dir), rows)
    assert any(bool(mask.any()) for mask in wanted.values())
    for key in keys:
        state = {name.removeprefix('module.'): value for name, value in checkpoint[key].items()}
        for name, mask in pruned_masks(state, rows).items():
            assert torch.equal(mask, wanted[name]), (key, name)


def load(path):
    return torch.load(path, weights_only=False)


def test_temperature_follows_its_schedule_from_first_to_last(finished_run):
    _, notes = finished_run
    search = [note['temperature'] for note in notes if note['state'] == 'soft']
    schedule = TemperatureSchedule(1.0, 0.01, 'geometric')
    assert search == [schedule(i / 11) for i in range(12)]
    assert (search[0], search[-1]) == (1.0, pytest.approx(0.01))


def test_every_soft_mask_meets_the_budget(finished_run):
    work_dir, notes = finished_run
    cost = torch.tensor(
        [16.0 if row['shape'][1] != 3 else 12.0 for row in report(work_dir)['layers']
         for _ in range(row['blocks_total'])]
    )  # fmt: skip
    for note in notes[6:18]:
        # The 3 input channels of the first layer and the 10 classes of the last give short blocks.
        kept = (torch.tensor(note['mask']) * cost).sum()
        assert float(kept) == pytest.approx(report(work_dir)['budget'], rel=0.01)


def test_mask_stays_as_the_search_left_it(finished_run):
    _, notes = finished_run
    assert all(note['mask'] == notes[18]['mask'] for note in notes[18:])
    assert set(notes[18]['mask']) == {0.0, 1.0}


def test_logs_show_temperature_sparsity_undecided_and_moved_of_the_search(finished_run):
    work_dir, notes = finished_run
    logged = [line for line in scalars(work_dir) if 'loss' in line]
    for line, note in zip(logged, notes, strict=True):
        searching = note['state'] == 'soft'
        assert [key in line for key in ('temperature', 'undecided', 'moved')] == 3 * [searching]
        if searching:
            mask = torch.tensor(note['mask'])
            undecided = ((mask > 0.05) & (mask < 0.95)).float().mean()
            assert line['temperature'] == note['temperature']
            assert line['undecided'] == pytest.approx(float(undecided))
            assert line['sparsity'] == pytest.approx(0.75, abs=1e-5)
            assert 0 <= line['moved'] <= 1
    assert logged[6]['moved'] == 0


def test_logs_at_the_end_of_an_epoch_shorter_than_their_interval_show_it_too(tmp_path):
    config = smart_config(tmp_path, default_hooks=dict(logger=dict(interval=50)))
    notes = run(config).value
    logged = [line for line in scalars(tmp_path) if 'loss' in line]
    assert [line.get('temperature') for line in logged] == [
        None, notes[11]['temperature'], notes[17]['temperature'], None
    ]  # fmt: skip


def test_importance_has_its_own_constant_learning_rate(finished_run):
    _, notes = finished_run
    assert {note['importance_lr'] for note in notes} == {0.01}
    assert len({note['lr'] for note in notes}) == len(notes)


def test_calibration_and_measuring_do_not_touch_the_random_stream(tmp_path, finished_run):
    """The same data and the same dropout, whether or not something is measured in between."""
    steps = pipeline(*(dict(type='Noise', source=s) for s in ('python', 'numpy', 'torch')))
    noisy = dict(
        train_dataloader=dict(dataset=dict(pipeline=steps)),
        val_dataloader=dict(dataset=dict(pipeline=steps)),
        model=dict(backbone=dict(drop_path_rate=0.3)),
        train_cfg=dict(val_interval=3),
    )
    # One-shot pruning in between, so that weights do not depend on what is compared.
    measured = smart_config(tmp_path / 'a', dict(importance=dict(init='activation')), **noisy)
    unmeasured = smart_config(tmp_path / 'b', dict(importance=dict(init='magnitude')), **noisy)
    unmeasured.update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    first, second = run(measured).value, run(unmeasured).value
    assert [note['data'] for note in first] == [note['data'] for note in second]
    assert len({note['data'] for note in first}) == 24
    assert [note['loss'] for note in first[:6]] == [note['loss'] for note in second[:6]]
    # From here on the masks differ, unless they are the same from the start.
    assert first[6]['mask'] != second[6]['mask']

    shot = [smart_config(tmp_path / name, dict(method='magnitude'), **noisy) for name in ('c', 'd')]
    shot[1].update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    third, fourth = run(shot[0]).value, run(shot[1]).value
    assert [note['loss'] for note in third] == [note['loss'] for note in fourth]


def test_run_without_validation_writes_files_without_metrics(tmp_path):
    config = smart_config(tmp_path)
    config.update(val_dataloader=None, val_evaluator=None, val_cfg=None)
    run(config)
    figures = report(tmp_path)
    assert set(figures['dense']) == set(figures['pruned']) == {'params', 'macs'}
    assert figures['pruned']['macs'] < figures['dense']['macs']


@pytest.mark.parametrize(
    'settings',
    [
        pytest.param(dict(), id='parameters'),
        pytest.param(dict(update_buffers=True), id='parameters and buffers'),
        pytest.param(dict(begin_epoch=4), id='begun after the search'),
    ],
)
def test_averages_are_pruned_like_the_model_from_the_search_on(tmp_path, settings):
    run(smart_config(tmp_path, custom_hooks=[dict(type='EMAHook', momentum=0.2, **settings)]))
    for epoch in (3, 4):
        checkpoint = load(tmp_path / f'epoch_{epoch}.pth')
        assert_pruned_like(tmp_path, checkpoint, ('state_dict', 'ema_state_dict'))
    # MMEngine stores the average, which it evaluates, under `state_dict`.
    stored = load(tmp_path / 'epoch_4.pth')['state_dict']
    written = pruned_weights(tmp_path)
    assert all(torch.equal(stored[key], written[key]) for key in stored)
    if settings.get('begin_epoch') != 4:
        moving = load(tmp_path / 'epoch_4.pth')['ema_state_dict']
        assert any(not torch.equal(stored[key], moving[f'module.{key}']) for key in stored)


@pytest.mark.parametrize('averaged', [True, False])
def test_weights_are_written_as_they_were_scored(tmp_path, averaged):
    """mmpretrain's hook may score the average, the model itself, or both, the average first."""
    average = dict(type='EMAHook', momentum=0.2, evaluate_on_ema=averaged, evaluate_on_origin=True)
    run(smart_config(tmp_path, custom_hooks=[average]))
    checkpoint, written = load(tmp_path / 'epoch_4.pth'), pruned_weights(tmp_path)
    model = {
        key.removeprefix('module.'): value for key, value in checkpoint['ema_state_dict'].items()
    }
    scored, other = checkpoint['state_dict'], model
    if not averaged:
        scored, other = other, scored
    assert all(torch.equal(scored[key], written[key]) for key in written)
    assert any(not torch.equal(other[key], written[key]) for key in written)


def test_metrics_of_the_report_are_those_of_the_last_validation(finished_run):
    work_dir, _ = finished_run
    measured = [line['accuracy/top1'] for line in scalars(work_dir) if 'accuracy/top1' in line]
    figures = report(work_dir)
    assert figures['pruned']['accuracy/top1'] == measured[-1]
    assert figures['dense']['accuracy/top1'] == measured[0]


def test_best_checkpoint_of_a_finished_run_is_a_pruned_one(tmp_path):
    # A rate of zero in the end: nothing after the search is better than the dense network was.
    config = smart_config(
        tmp_path,
        dict(sparsity=0.95, stages=dict(pretrain=0.75, search=0.125, finetune=0.125)),
        default_hooks=dict(checkpoint=dict(save_best='accuracy/top1')),
        optim_wrapper=dict(optimizer=dict(lr=0.1)),
        train_cfg=dict(max_epochs=8),
        train_dataloader=dict(dataset=dict(indices=480)),
    )
    run(config)
    figures = report(tmp_path)
    assert figures['dense']['accuracy/top1'] > figures['pruned']['accuracy/top1']
    (best,) = tmp_path.glob('best_*.pth')
    assert_pruned_like(tmp_path, load(best))


def test_early_stop_in_the_search_writes_no_files(tmp_path):
    stages = dict(pretrain=0.0, search=1.0, finetune=0.0)
    config = smart_config(tmp_path, dict(stages=stages), custom_hooks=[EARLY_STOP])
    outcome = run(config)
    assert len(outcome.value) == 12
    assert 'training stopped at iteration 12, before the search ended at 24' in outcome.log
    assert_nothing_written(tmp_path)


def test_early_stop_in_the_fine_tuning_writes_the_files(tmp_path):
    stages = dict(pretrain=0.0, search=0.25, finetune=0.75)
    config = smart_config(tmp_path, dict(stages=stages), custom_hooks=[EARLY_STOP])
    assert len(run(config).value) == 12
    figures = report(tmp_path)
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']


def test_early_stop_counts_from_the_pruned_network_on(tmp_path):
    stages = dict(pretrain=0.25, search=0.25, finetune=0.5)
    patient = merged(EARLY_STOP, dict(patience=2))
    config = smart_config(tmp_path, dict(stages=stages), custom_hooks=[patient])
    assert len(run(config).value) == 24  # and not 18, two validations after the dense one


def test_plateau_of_the_learning_rate_counts_from_the_pruned_network_on(tmp_path):
    stages = dict(pretrain=0.0, search=0.5, finetune=0.5)
    config = smart_config(tmp_path, dict(stages=stages))
    config['param_scheduler'] = dict(
        type='ReduceOnPlateauLR', monitor='accuracy/top1', rule='greater',
        threshold=200, threshold_rule='abs', patience=0,
    )  # fmt: skip
    rates = [note['lr'] for note in run(config).value]
    # Epochs 1 and 2 are the search's. Only the scores after epochs 3 and 4 have one before them
    # of the same kind; that of the dense network, measured as the search begins, is of another.
    assert rates == pytest.approx([0.02] * 18 + [0.002] * 6)


def test_measuring_between_two_validations_saves_and_stops_nothing(tmp_path):
    """The search begins and ends between two validations; hooks that act on metrics wait."""
    config = smart_config(
        tmp_path,
        default_hooks=dict(checkpoint=dict(save_best='accuracy/top1')),
        custom_hooks=[merged(EARLY_STOP, dict(patience=1))],
        train_cfg=dict(val_interval=4),
    )
    outcome = run(config)
    assert len(outcome.value) == 24
    assert [path.name for path in tmp_path.glob('best_*.pth')] == ['best_accuracy_top1_epoch_4.pth']
    assert 'accuracy/top1' in report(tmp_path)['dense']


def test_loader_with_a_batch_sampler_is_calibrated_on_whole_batches(tmp_path, finished_run):
    _, notes = finished_run
    config = smart_config(tmp_path)
    config['train_dataloader']['batch_sampler'] = dict(type='FixedBatches', drop_last=False)
    assert run(config).value == notes


@pytest.mark.parametrize('init', ['gradient', 'random', 'zero'])
def test_search_begins_from_what_init_names_at_its_scale(tmp_path, init):
    smart = dict(
        importance=dict(init=init, scale=0.5),
        temperature=dict(start=1.0, end=0.1),
        stages=dict(pretrain=0.5, search=0.5, finetune=0.0),
    )
    config = smart_config(tmp_path, smart, train_cfg=dict(max_epochs=1), val_dataloader=None)
    config.update(val_evaluator=None, val_cfg=None)
    first = torch.tensor(
        next(note['mask'] for note in run(config).value if note['state'] == 'soft')
    )
    spread = float(first.logit().std())  # of (m - θ)/τ at τ = 1
    assert spread == pytest.approx(0.0 if init == 'zero' else 0.5, abs=0.05)
