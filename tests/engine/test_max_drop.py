"""`smart.max_drop`: the sparsity that keeps a metric, found by short runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import HOOKS, DefaultScope
from mmengine.visualization import Visualizer

from engine.runs import (
    apart,
    assert_nothing_written,
    assert_same_end,
    merged,
    smart_config,
    stock_config,
    train,
    train_here,
)
from mmsmart.engine.config import Smart
from mmsmart.engine.max_drop import highest_that_holds
from mmsmart.engine.short_runs import FasterSchedule

# The bisection


@given(st.floats(0, 1), st.integers(1, 12), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_bisection_ends_next_to_the_highest_sparsity_that_holds(border, trials, bounds):
    low, high = sorted(bounds)
    tried = []

    def holds(sparsity):
        tried.append(sparsity)
        return sparsity <= border

    found = highest_that_holds(holds, low, high, trials)
    assert len(tried) <= trials and all(low < sparsity < high for sparsity in tried)
    held = [sparsity for sparsity in tried if sparsity <= border]
    assert found == (max(held) if held else None)
    if low <= border <= high:
        # Halved once a trial, as far as three decimals go.
        nearest = min([x for x in tried if x > border], default=high)
        assert nearest - (found or low) <= (high - low) / 2**trials + 0.002


@given(st.lists(st.booleans(), min_size=1, max_size=10))
def test_whatever_holds_the_highest_tried_that_held_is_found_and_none_tried_twice(answers):
    tried = {}

    def holds(sparsity):
        assert sparsity not in tried
        tried[sparsity] = answers[len(tried)]
        return tried[sparsity]

    found = highest_that_holds(holds, 0.0, 1.0, len(answers))
    assert found == max((x for x, held in tried.items() if held), default=None)


@given(st.integers(1, 200), st.integers(1, 50))
def test_a_faster_schedule_ends_where_the_longer_one_does(full, short):
    short = min(full, short)
    hook = FasterSchedule(speed=full / short)
    steps = [hook._steps(done) for done in range(short)]
    assert sum(steps) == full
    assert max(steps) - min(steps) <= 1


# Settings


@pytest.mark.parametrize(
    ('smart', 'message'),
    [
        (dict(max_drop=1, sparsity=0.5), 'smart.max_drop: 1 finds the sparsity, .* says 0.5'),
        (dict(max_drop=1, block='2:4'), "smart.max_drop: the block '2:4' fixes the sparsity"),
        (dict(max_drop=-1), 'smart.max_drop.drop: expected a number of at least 0, got -1'),
        (dict(max_drop='1%'), "smart.max_drop.drop: expected a number .* got '1%'"),
        (dict(max_drop=dict(trials=3)), 'smart.max_drop.drop: expected a number .* got None'),
        (dict(max_drop=dict(drop=1, trials=0)), 'smart.max_drop.trials: expected an integer'),
        (dict(max_drop=dict(drop=1, share=0)), r'smart.max_drop.share: 0 is outside \(0, 1\]'),
        (dict(max_drop=dict(drop=1, low=0.9, high=0.5)), 'smart.max_drop: expected 0 <= low <'),
        (dict(max_drop=dict(drop=1, metrics='a')), "unknown key 'metrics'.*mean 'metric'"),
    ],
)
def test_settings_that_can_not_be_met_are_refused(smart, message):
    with pytest.raises(ValueError, match=message):
        Smart(**smart)


# Runs. The metric of these is made up: 100 less fifty times the share of weights that are zero, so
# that what holds is known beforehand.


@HOOKS.register_module()
class MadeUpMetric(Hook):
    """Scores the sparsity of the model, and can count what is wrong instead of what is right."""

    priority = 'HIGHEST'

    def __init__(self, name: str = 'accuracy', scale: float = 1.0, wrong: bool = False) -> None:
        self.name, self.scale, self.wrong = name, scale, wrong

    def before_train(self, runner):
        """Hooks and data preprocessors of the toolboxes ask for the current instances."""
        assert MessageHub.get_current_instance() is runner.message_hub
        assert MMLogger.get_current_instance() is runner.logger
        assert Visualizer.get_current_instance() is runner.visualizer
        assert DefaultScope.get_current_instance().scope_name == runner.default_scope.scope_name

    def after_val_epoch(self, runner, metrics=None):
        weights = [x.weight for x in runner.model.modules() if hasattr(x, 'weight')]
        weights = [weight for weight in weights if weight.ndim > 1]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        lost = 50 * zeros / sum(weight.numel() for weight in weights)
        metrics.clear()
        metrics[self.name] = self.scale * (lost if self.wrong else 100 - lost)


@HOOKS.register_module()
class KillIn(Hook):
    """Ends the process in the middle of the run in a folder of this name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if Path(runner.work_dir).name == self.name and runner.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train_with_hooks(config):
    """`train_here`, in a process that knows the hooks of this module by having imported it."""
    return train_here(config)


def run(config):
    Path(config['work_dir']).mkdir(parents=True, exist_ok=True)
    config['custom_hooks'] = [*config['custom_hooks'], dict(type='Witness')]
    return apart(train_with_hooks, config, log=Path(config['work_dir']) / 'stdout.txt')


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    """A trained checkpoint."""
    work_dir = tmp_path_factory.mktemp('dense')
    outcome = train(stock_config(work_dir, train_cfg=dict(max_epochs=1)))
    assert outcome.error is None, outcome.log
    return work_dir / 'epoch_1.pth'


def config_of(work_dir, dense, max_drop, metric=None, hooks=(), **smart):
    """A run of 2 epochs of 6 iterations; a trial is one epoch of it."""
    settings = dict(
        sparsity=None,
        max_drop=max_drop,
        stages=dict(pretrain=0.0, search=0.5, finetune=0.5),
    )
    config = smart_config(work_dir, merged(settings, smart), train_cfg=dict(max_epochs=2))
    config['custom_hooks'] = [dict(type='MadeUpMetric', **(metric or {})), *hooks]
    config['load_from'] = str(dense)
    return config


# 0.5 and 0.625 hold (25 and 31.25 points lost), 0.75 does not (37.5).
BOUNDS = dict(drop=33, trials=3, share=0.5)


@pytest.fixture(scope='module')
def found(tmp_path_factory, dense):
    """Folder of a finished search and its record."""
    work_dir = tmp_path_factory.mktemp('found')
    outcome = run(config_of(work_dir, dense, BOUNDS))
    assert outcome.error is None and outcome.exitcode == 0, outcome.log
    return work_dir, record_of(work_dir), outcome


def record_of(work_dir):
    return json.loads((work_dir / 'max_drop.json').read_text())


def iterations_of(work_dir):
    """Learning rates of a run's iterations, from its log."""
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line['lr'] for line in lines if 'lr' in line]


def test_the_run_goes_on_at_the_highest_sparsity_whose_trial_held(found):
    work_dir, record, _ = found
    tried = [(trial['sparsity'], trial['held']) for trial in record['trials']]
    assert tried == [(0.5, True), (0.75, False), (0.625, True)]
    assert record['sparsity'] == 0.625 and record['dense'] == 100
    pruning = json.loads((work_dir / 'pruning.json').read_text())
    assert pruning['target_sparsity'] == 0.625
    assert record['run'] == {'value': pruning['pruned']['accuracy'], 'held': True}


def test_the_whole_run_is_the_one_that_a_plain_sparsity_makes(tmp_path, dense, found):
    work_dir, _, outcome = found
    config = config_of(tmp_path, dense, None, sparsity=0.625)
    plain = run(config)
    assert plain.error is None, plain.log
    assert plain.value == outcome.value
    assert_same_end(work_dir, tmp_path)


def test_the_compute_limit_is_said_at_the_start_and_kept(found):
    work_dir, record, outcome = found
    said = 'At most 3 trials of 6 iterations, 18 in all; the run itself has 12.'
    assert outcome.log.index(said) < outcome.log.index('Epoch(train)')
    assert record['limit'] == dict(trials=3, iterations_each=6, iterations=18, iterations_run=12)
    trained = [iterations_of(folder) for folder in (work_dir / 'trials').glob('sparsity_*')]
    assert [len(iterations) for iterations in trained] == [6, 6, 6]
    assert not list((work_dir / 'trials/dense').glob('*.pth'))


def test_learning_rates_of_a_trial_are_every_other_one_of_the_run(found):
    work_dir, *_ = found
    whole = iterations_of(work_dir)
    assert len(set(whole)) == 12
    assert iterations_of(work_dir / 'trials/sparsity_0.750') == pytest.approx(whole[::2])


def test_a_killed_search_is_resumed_without_running_finished_trials_again(tmp_path, dense, found):
    finished, record, _ = found
    killed = run(
        config_of(tmp_path, dense, BOUNDS, hooks=[dict(type='KillIn', name='sparsity_0.750')])
    )
    assert killed.exitcode == -9
    first = tmp_path / 'trials/sparsity_0.500'
    before = (first / 'pruning.json').stat().st_mtime_ns
    assert len(record_of(tmp_path)['trials']) == 1
    # As stock tools say --resume: the checkpoint that the run began with is named no more.
    config = config_of(tmp_path, dense, BOUNDS)
    config.update(resume=True, load_from=None)
    resumed = run(config)
    assert resumed.error is None, resumed.log
    assert (first / 'pruning.json').stat().st_mtime_ns == before
    assert {**record_of(tmp_path), 'load_from': None} == {**record, 'load_from': None}
    assert_same_end(finished, tmp_path)


def test_a_killed_search_never_goes_on_from_a_run_before_it(tmp_path, dense, found):
    finished, record, _ = found
    shutil.copytree(finished, tmp_path / 'run')  # another search wrote to this folder before
    config = config_of(
        tmp_path / 'run', dense, BOUNDS, hooks=[dict(type='KillIn', name='sparsity_0.500')]
    )
    assert run(config).exitcode == -9
    for trial in ('sparsity_0.750', 'sparsity_0.625'):  # which it had not begun
        assert not (tmp_path / 'run/trials' / trial / 'last_checkpoint').exists()
        (tmp_path / 'run/trials' / trial / 'epoch_1.pth').unlink()
    config = config_of(tmp_path / 'run', dense, BOUNDS)
    config.update(resume=True, load_from=None)
    resumed = run(config)
    assert resumed.error is None, resumed.log
    assert [note['iter'] for note in resumed.value] == list(range(12))
    assert record_of(tmp_path / 'run')['trials'] == record['trials']
    assert_same_end(finished, tmp_path / 'run')


def test_settings_that_changed_are_refused_on_resuming(tmp_path, dense, found):
    _, record, _ = found
    (tmp_path / 'max_drop.json').write_text(json.dumps(record))
    config = config_of(tmp_path, dense, {**BOUNDS, 'drop': 5})
    config.update(resume=True)
    outcome = run(config)
    assert 'smart.max_drop was begun with another max_drop, drop.' in outcome.error


def test_where_no_trial_holds_nothing_is_trained_and_the_figures_are_told(tmp_path, dense):
    """A point of a metric that ends at 1 is a hundredth."""
    metric = dict(name='bbox_mAP', scale=0.01)
    outcome = run(config_of(tmp_path, dense, dict(drop=1, trials=1, share=0.5), metric))
    assert outcome.error.startswith('ValueError: smart.max_drop: none of the tried sparsities')
    assert '1 points, at 0.99 or more: 0.5 gives 0.75.' in outcome.error
    assert not list(tmp_path.glob('*.pth')) and not (tmp_path / 'pruning.json').exists()
    assert record_of(tmp_path)['sparsity'] is None


def test_of_a_metric_that_counts_what_is_wrong_less_is_better(tmp_path, dense):
    bounds = dict(drop=33, trials=1, share=0.5, low=0.25)  # tries 0.625 alone
    outcome = run(config_of(tmp_path, dense, bounds, dict(name='loss', wrong=True)))
    assert outcome.error is None, outcome.log
    assert '33 points, at 33 or less' in outcome.log
    (trial,) = record_of(tmp_path)['trials']
    assert trial['held'] and trial['value'] == pytest.approx(31.25, abs=0.2)


REFUSED = {
    'the drop is that from a trained checkpoint. Name it in load_from': dict(load_from=None),
    'a validation is needed': dict(val_dataloader=None, val_cfg=None, val_evaluator=None),
    'pretrain has to be 0': dict(smart=dict(stages=dict(pretrain=0.5, search=0.25, finetune=0.25))),
    'max_drop.share: 0.25 of train_cfg.max_epochs = 2 is less': dict(
        smart=dict(max_drop=dict(share=0.25))
    ),
    "metric: 'mIoU' is None for": dict(smart=dict(max_drop=dict(metric='mIoU'))),
    "of 'f1' is better is not known": dict(custom_hooks=[dict(type='MadeUpMetric', name='f1')]),
}


def refusals(configs):
    """The error that each run ends with."""
    errors = []
    for config in configs:
        with pytest.raises(ValueError) as error:
            train_here(config)
        errors.append(str(error.value))
    return errors


def test_a_run_that_has_nothing_to_compare_with_is_refused(tmp_path, dense):
    config = {**config_of(tmp_path, dense, BOUNDS)}
    configs = [
        {**merged(config, changes), 'experiment_name': f'run{i}'}
        for i, changes in enumerate(REFUSED.values())
    ]
    outcome = apart(refusals, configs, log=tmp_path / 'stdout.txt')
    assert outcome.error is None, outcome.log
    for message, error in zip(REFUSED, outcome.value):
        assert error.startswith('smart.max_drop') and message in error
    assert_nothing_written(tmp_path)
