"""`smart.max_drop`: the highest sparsity that keeps a metric, found by bisection over short runs.

Every short run (trial) is a whole pruning run, search and fine-tuning, at a share of the length, in
a folder of its own. They run one after the other in the processes of the run itself, so that they
need no launcher of their own and every process takes the same decisions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner, find_latest_checkpoint

from mmsmart.engine.config import MaxDrop, Smart, Stages, build
from mmsmart.engine.runner_models import trained_model
from mmsmart.engine.short_runs import lengths, short_run, shortened
from mmsmart.export import complete_or_absent, plain
from mmsmart.install import masks_of

# Metrics come rounded, and a drop of exactly what is allowed holds.
_ROUNDING = 1e-9


def highest_that_holds(
    holds: Callable[[float], bool], low: float, high: float, trials: int
) -> float | None:
    """The highest tried value that holds, by bisection between two bounds that are not tried.

    Args:
        holds: Tries a value, rounded to three decimals; asked at most `trials` times.
        low: Below this one nothing is tried.
        high: Above this one nothing is tried.
        trials: Most values to try.

    Returns:
        None if no tried value held.

    Example:
        >>> highest_that_holds(lambda sparsity: sparsity < 0.7, low=0.0, high=1.0, trials=4)
        0.688
    """
    best = None
    for _ in range(trials):
        middle = round((low + high) / 2, 3)
        if not low < middle < high:
            break
        if holds(middle):
            best = low = middle
        else:
            high = middle
    return best


class SparsitySearch:
    """The trials of one run, their record in `max_drop.json`, and the sparsity they end at.

    Args:
        runner: The runner of the whole run, which has not trained yet.
        smart: Its settings, with `max_drop`.

    Raises:
        ValueError: If the run has nothing to compare with: no trained checkpoint, no validation, or
            a sparsity that is fixed elsewhere.
    """

    def __init__(self, runner: Runner, smart: Smart) -> None:
        self.runner, self.smart = runner, smart
        self.drop: MaxDrop = smart.drop()
        self.file = Path(runner.work_dir) / 'max_drop.json'
        _check(runner, smart)
        self.record = self._begun()

    def settle(self) -> float:
        """The sparsity of the whole run. Finished trials of a resumed run are not run again.

        Raises:
            ValueError: If no trial held.
        """
        record = self.record
        if record['sparsity'] is None:
            if not self.runner._resume:
                self._forget_older_runs()
            self._save()
            self._measure_dense()
            bounds = (self.drop.low, self.drop.high, self.drop.trials)
            found = highest_that_holds(self._holds, *bounds)
            if found is None:
                tried = ', '.join(_told(trial) for trial in record['trials'])
                raise ValueError(
                    f'smart.max_drop: none of the tried sparsities keeps {record["metric"]} within '
                    f'{self._bound()}: {tried}. Allow a larger drop, make the trials longer '
                    '(max_drop.share), or lower max_drop.low. Nothing was trained on.'
                )
            record['sparsity'] = found
            self._save()
        self._say(f'the run goes on at a sparsity of {record["sparsity"]:g}.')
        runner = self.runner
        if runner._resume and runner._load_from in (None, record['load_from']):
            runner._load_from = None
            if find_latest_checkpoint(runner.work_dir) is None:  # killed during the trials
                runner._resume, runner._load_from = False, record['load_from']
        return record['sparsity']

    def conclude(self) -> None:
        """Note whether the whole run stayed within the drop."""
        figures = self._figures(Path(self.runner.work_dir))
        if figures is None:
            return
        value = figures['pruned'].get(self.record['metric'])
        held = self._within(value)
        self.record['run'] = {'value': value, 'held': held}
        self._save()
        figure = 'not finite' if value is None else f'{value:.4g}'
        stays = 'stays' if held else 'does not stay'
        self._say(f'{self.record["metric"]} is {figure} after the run; it {stays} within the drop.')

    def _begun(self) -> dict[str, Any]:
        """The record to go on with: that of a killed run if this one resumes it."""
        runner = self.runner
        settings = json.loads(json.dumps({**plain(asdict(self.smart)), **asdict(self.drop)}))
        record = None
        if runner._resume:
            record = _on_all(lambda: _read(self.file))
            if record is None:
                raise ValueError(
                    f'resume: {self.file} is not there, which says what smart.max_drop has found. '
                    'Start anew with load_from.'
                )
            other = [key for key in settings if record['settings'].get(key) != settings[key]]
            if other:
                raise ValueError(
                    f'resume: smart.max_drop was begun with another {", ".join(other)}. Resume '
                    'with the same settings, or start anew with load_from.'
                )
        return record or {
            'settings': settings,
            'load_from': runner._load_from,
            'metric': None,
            'dense': None,
            'allowed': None,
            'limit': None,
            'trials': [],
            'sparsity': None,
        }

    def _measure_dense(self) -> None:
        """Metric, its direction and the compute limit, before the first trial."""
        record, drop = self.record, self.drop
        if record['dense'] is not None:
            return
        config = self._config(drop.low, 'dense')
        with short_run(type(self.runner), config, self.runner.cfg) as probe:
            metrics, each = plain(dict(probe.val())), probe.max_iters
        metric = drop.metric or _best_by(self.runner) or next(iter(metrics), None)
        dense = metrics.get(metric)
        if not isinstance(dense, (int, float)) or not math.isfinite(dense):
            raise ValueError(
                f'smart.max_drop.metric: {metric!r} is {dense!r} for the loaded checkpoint; the '
                f'validation gives {metrics}.'
            )
        rule = _rule(self.runner, metric)
        point = 0.01 if rule == 'greater' and abs(dense) <= 1 else 1.0
        full, short = lengths(self.runner.cfg, drop.share)
        run = round(each * full / short)
        record.update(
            metric=metric, rule=rule, dense=dense, allowed=drop.drop * point,
            limit={'trials': drop.trials, 'iterations_each': each,
                   'iterations': drop.trials * each, 'iterations_run': run},
        )  # fmt: skip
        self._save()
        self._say(
            f'looking for the highest sparsity between {drop.low:g} and {drop.high:g} that keeps '
            f'{metric} within {self._bound()} (dense {dense:.4g}; a point is {point:g}). At most '
            f'{drop.trials} trials of {each} iterations, {drop.trials * each} in all; the run '
            f'itself has {run}.'
        )

    def _holds(self, sparsity: float) -> bool:
        for trial in self.record['trials']:
            if trial['sparsity'] == sparsity:
                return trial['held']
        trial = {'sparsity': sparsity, **self._trial(sparsity)}
        trial['held'] = self._within(trial['value'])
        self.record['trials'].append(trial)
        self._save()
        self._say(
            f'trial {len(self.record["trials"])} of at most {self.drop.trials}: {_told(trial)}, '
            f'{"holds" if trial["held"] else "does not hold"}.'
        )
        return trial['held']

    def _trial(self, sparsity: float) -> dict[str, Any]:
        config = self._config(sparsity, f'sparsity_{sparsity:.3f}')
        try:
            with short_run(type(self.runner), config, self.runner.cfg) as runner:
                runner.train()
        except ValueError as error:
            if not str(error).startswith('sparsity: '):
                raise
            return {'value': None, 'reason': str(error)}  # so few blocks can't be kept
        figures = self._figures(Path(config.work_dir)) or {'pruned': {}}  # it was stopped early
        return {'value': figures['pruned'].get(self.record['metric'])}

    def _config(self, sparsity: float, name: str) -> Config:
        """The config of a trial; of one that was killed, to be resumed."""
        runner = self.runner
        config = shortened(runner.cfg, self.drop.share)
        folder = Path(runner.work_dir) / 'trials' / name
        last = find_latest_checkpoint(str(folder)) if runner._resume else None
        config.update(
            smart={**plain(config.smart), 'sparsity': sparsity, 'max_drop': None},
            work_dir=str(folder),
            experiment_name=f'{runner.experiment_name}_{name}',
            load_from=None if last else self.record['load_from'],
            resume=last is not None,
            randomness={**(config.get('randomness') or {}), 'seed': runner.seed},
        )
        return config

    def _forget_older_runs(self) -> None:
        """Nothing that this run resumes, killed at any time, may go on from one before it."""
        if dist.is_main_process():
            folder = Path(self.runner.work_dir)
            (folder / 'last_checkpoint').unlink(missing_ok=True)
            for trial in (folder / 'trials').glob('*'):
                for file in ('last_checkpoint', 'pruning.json'):
                    (trial / file).unlink(missing_ok=True)
        dist.barrier()

    @staticmethod
    def _figures(folder: Path) -> dict[str, Any] | None:
        return _on_all(lambda: _read(folder / 'pruning.json'))

    def _within(self, value: float | None) -> bool:
        if value is None:  # NaN, in JSON
            return False
        drop = self.record['dense'] - value
        drop = drop if self.record['rule'] == 'greater' else -drop
        return drop <= self.record['allowed'] + _ROUNDING

    def _bound(self) -> str:
        record = self.record
        greater = record['rule'] == 'greater'
        bound = record['dense'] + (-1 if greater else 1) * record['allowed']
        return f'{self.drop.drop:g} points, at {bound:.4g} or {"more" if greater else "less"}'

    def _save(self) -> None:
        if dist.is_main_process():
            with complete_or_absent(self.file) as temporary:
                temporary.write_text(json.dumps(self.record, indent=2) + '\n')

    def _say(self, text: str) -> None:
        self.runner.logger.info(f'mmsmart: max_drop: {text}')


def _check(runner: Runner, smart: Smart) -> None:
    model = trained_model(runner)
    if masks_of(model) is not None:
        raise ValueError(
            'smart.max_drop: the config names mmsmart.SmartModel, whose sparsity is fixed. Write '
            'the upstream model there.'
        )
    if runner._val_loop is None:
        raise ValueError('smart.max_drop: a validation is needed, and val_dataloader is missing.')
    if not runner._resume and not runner._load_from:
        raise ValueError(
            'smart.max_drop: the drop is that from a trained checkpoint. Name it in load_from.'
        )
    if build(Stages, 'smart.stages', smart.stages).pretrain > 0:
        raise ValueError(
            'smart.max_drop: the drop is that from the checkpoint of load_from, so '
            'smart.stages.pretrain has to be 0.'
        )
    try:
        lengths(runner.cfg, smart.drop().share)
    except ValueError as error:
        raise ValueError(f'smart.max_drop.{error}') from error


def _best_by(runner: Runner) -> str | None:
    """The metric that the best checkpoint is saved by."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best and hook.key_indicators[0] != 'auto':
            return hook.key_indicators[0]
    return None


def _rule(runner: Runner, metric: str) -> str:
    """Whether more ('greater') or 'less' of it is better, as the hook that saves the best says."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            rules = dict(zip(hook.key_indicators, hook.rules))
            if rules.get(metric, rules.get('auto')):
                return rules.get(metric, rules.get('auto'))
    try:
        return CheckpointHook(save_best=metric).rules[0]
    except ValueError as error:
        raise ValueError(
            f'smart.max_drop.metric: whether more or less of {metric!r} is better is not known. '
            f'Write default_hooks.checkpoint = dict(save_best={metric!r}, rule=...), with the rule '
            "'greater' or 'less'."
        ) from error


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _on_all(read: Callable[[], Any]) -> Any:
    """What the first process reads, in all of them."""
    values = [read() if dist.is_main_process() else None]
    dist.broadcast_object_list(values)
    return values[0]


def _told(trial: dict[str, Any]) -> str:
    value = trial['value']
    if 'reason' in trial:
        return f'{trial["sparsity"]:g} is impossible'
    return f'{trial["sparsity"]:g} gives {"no finite figure" if value is None else f"{value:.4g}"}'
