"""The hook that times pruning: what happens is in :mod:`mmsmart.masking`, this says when."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook, LoggerHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from mmsmart.engine.best_scores import forget_best_scores, only_measuring
from mmsmart.engine.calibration import first_importance, layer_positions, recalibrate
from mmsmart.engine.config import (
    ImportanceStart,
    Stages,
    Temperature,
    build,
    checked_recalibrate,
    make_method,
)
from mmsmart.engine.diagnosis import check_checkpoint
from mmsmart.engine.distillation import read_distillation
from mmsmart.engine.optim_wrapper import MaskedStep
from mmsmart.engine.outcome import write_outcome
from mmsmart.engine.pictures import show_masks
from mmsmart.engine.processes import expect_agreement, refuse_strategies, same_everywhere
from mmsmart.engine.random_state import ResumableRandomness
from mmsmart.engine.run_log import note_start
from mmsmart.engine.runner_models import trained_model
from mmsmart.install import masks_of
from mmsmart.masking import BlockMasks
from mmsmart.registry import HOOKS

_DENSE_METRICS = 'smart_dense_metrics'
_SEARCH = 'smart_search'  # where a checkpoint has the first iteration of the search and its end


@HOOKS.register_module()
class SmartPruningHook(Hook):
    """Search and fine-tune stages of a run, the falling temperature, and the files at its end.

    Needs a model with masks (`mmsmart.SmartModel`) and `mmsmart.SmartOptimWrapper` or its AMP
    sibling; `mmsmart.SmartRunner` puts all three in place.

    Args:
        method: 'smart', or the name of another of :data:`mmsmart.methods.METHODS`; those that cut
            once do so at the beginning of the search and fine-tune from there on.
        method_cfg: Settings of the method.
        stages: `dict(pretrain=0.0, search=0.6, finetune=0.4)`, shares of the run's iterations.
        temperature: `dict(start=1.0, end=0.01, shape='geometric')`.
        importance: `dict(init='magnitude', scale=0.1, batches=16, curvature=1.0)`: where the
            search starts, and how strongly the importance follows the curvature of the loss.
        distillation: `dict(weight=5.0, of='outputs')`, or the weight: from the search on, the
            loss keeps the network's outputs, or the backbone's features, near the dense ones.
        recalibrate: Training batches over which BatchNorm's statistics are measured anew when the
            masks turn hard.

    Raises:
        ValueError: For values out of range, before training begins.
    """

    # Before EMAHook (NORMAL), whose average of the same iteration then holds pruned weights.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        method: str = 'smart',
        method_cfg: dict[str, Any] | None = None,
        stages: dict[str, float] | None = None,
        temperature: dict[str, Any] | None = None,
        importance: dict[str, Any] | None = None,
        distillation: float | dict[str, Any] | None = None,
        recalibrate: int = 0,
    ) -> None:
        make_method(method, method_cfg)
        self.method, self.method_cfg = method, method_cfg
        self.stages: Stages = build(Stages, 'smart.stages', stages)
        self.schedule = build(Temperature, 'smart.temperature', temperature).schedule()
        self.start: ImportanceStart = build(ImportanceStart, 'smart.importance', importance)
        self.distillation = read_distillation(distillation)
        self.recalibrate = checked_recalibrate(recalibrate)
        self.masks: BlockMasks | None = None
        self._begin = self._end = self._shown = 0
        self._metrics: dict[str, float] = {}
        self._metrics_iter: int | None = None
        self._positions: dict[str, int] = {}
        self._randomness = ResumableRandomness()

    def before_run(self, runner: Runner) -> None:
        """Take hold of masks and optimiser wrapper; refuse a run that would train past them."""
        refuse_strategies(runner)
        if not isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
            return  # a test or validation run: nothing is trained
        wrapper, model = runner.optim_wrapper, trained_model(runner)
        masks = masks_of(model)
        if not isinstance(wrapper, MaskedStep):
            raise ValueError(
                f'optim_wrapper.type: {type(wrapper).__name__} would train past the masks. Write '
                "type='mmsmart.SmartOptimWrapper', or 'mmsmart.SmartAmpOptimWrapper' for mixed "
                'precision (a `--amp` of the command line replaces the type that you wrote; leave '
                'it out, or use the base file `_base_/smart.py`, which knows it).'
            )
        if masks is None:
            raise ValueError(
                'model: SmartPruningHook found no block masks on it. Write '
                "model = dict(type='mmsmart.SmartModel', model=..., sparsity=...), or use the "
                'base file `_base_/smart.py`.'
            )
        self._begin, self._end = self.stages.boundaries(runner.max_iters)
        settings = dict(self.method_cfg or {})
        if self.method == 'smart':
            settings.setdefault('curvature', self.start.curvature)
        masks.method = make_method(self.method, settings)
        settings = self.distillation
        wrapper.attach(masks, settings and settings.teacher(model))
        if runner.cfg.get('compile'):  # of a train step, what moves masks and weights is no part
            wrapper.step = torch.compiler.disable(wrapper.step)
        self.masks = masks

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, which MMEngine would load in part."""
        refuse_strategies(runner)
        if self.masks is None:
            return
        untrained = check_checkpoint(
            trained_model(runner),
            self.masks,
            checkpoint,
            new_layers=self.stages.pretrain > 0 and not runner._resume,
        )
        if untrained:
            runner.logger.warning(
                f'mmsmart: load_from: {", ".join(untrained[:4])}'
                f'{", ..." if len(untrained) > 4 else ""} of the model start untrained; '
                'smart.stages.pretrain trains them before the search.'
            )
        if runner._resume:
            self._expect_same_search(checkpoint)
            self._randomness.load_from(checkpoint, runner)

    def _expect_same_search(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a search that would now have another length."""
        masks = checkpoint.get('optimizer', {}).get('smart', {}).get('masks', {})
        written, now = checkpoint.get(_SEARCH), [self._begin, self._end]
        if written is None or written == now or masks.get('state') != 'soft':
            return
        raise ValueError(
            f'resume: the checkpoint is of a search over iterations {written[0]} to {written[1]}, '
            f'which would now be {now[0]} to {now[1]}: the run has another length, or other '
            'smart.stages. With another number of processes, keep the number of images a step: '
            'train_dataloader.batch_size times processes.'
        )

    def before_train(self, runner: Runner) -> None:
        if self.masks is None:
            return
        if runner.iter <= self._begin:
            due = 'dense'
        else:
            is_soft = runner.iter < self._end and not self.masks.method.one_shot
            due = 'soft' if is_soft else 'hard'
        if self.masks.state != due:
            raise ValueError(
                f'resume: at iteration {runner.iter} of {runner.max_iters} the masks should be '
                f'{due}, but the checkpoint left them {self.masks.state}. Resume with the same '
                '`smart.stages`, method and length of the run, or start anew with `load_from`.'
            )
        if due == 'dense' and self._begin == 0 and not runner._has_loaded:
            runner.logger.warning(
                'mmsmart: the search begins from weights that no checkpoint was loaded into. Set '
                '`load_from`, or give smart.stages.pretrain a share.'
            )
        expect_agreement(self.masks, f'at the start from iteration {runner.iter}')
        counted = self.masks.positions
        self._positions = counted or layer_positions(runner, trained_model(runner))
        note_start(runner, self.masks, self._positions, self._begin, self._end, self.method)
        if runner.iter < self._begin:
            runner.logger.info(
                f'mmsmart: dense training up to iteration {self._begin}, then search to '
                f'{self._end} and fine-tuning to {runner.max_iters}.'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        self._randomness.before_epoch(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.masks is None:
            return
        self._randomness.before_iter(runner)
        if runner.iter == self._begin and self.masks.state == 'dense':
            self._begin_search(runner)
        if self.masks.state == 'soft':
            self._set_progress(runner, runner.iter + 1)
            # Now, so that they stand beside the loss that they led to.
            if self._is_logged(runner, batch_idx):
                self._log(runner)
        elif runner.iter == self._end:
            # The last values of the search would stand in every later log line.
            for name in ('temperature', 'undecided', 'moved'):
                runner.message_hub.log_scalars.pop(f'train/{name}', None)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if self.masks is None or self.masks.state != 'soft':
            return
        if runner.iter + 1 == self._end:
            self.masks.harden()
            self._is_hard(runner)

    def before_val(self, runner: Runner) -> None:
        self._randomness.before_validation()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._metrics, self._metrics_iter = dict(metrics or {}), runner.iter
        # About ten pictures of a search, however often it is validated.
        is_due = runner.iter - self._shown >= (self._end - self._begin) / 10
        if self.masks is not None and self.masks.state == 'soft' and is_due:
            self._show(runner)

    def after_val(self, runner: Runner) -> None:
        self._randomness.after_validation()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self.masks is not None:
            self._randomness.save_to(checkpoint)
            checkpoint[_SEARCH] = [self._begin, self._end]

    def after_train(self, runner: Runner) -> None:
        """Write `pruned.pth`, `pruning.json` and `pruning.png` to `work_dir`."""
        if self.masks is None:
            return
        if self.masks.state != 'hard':
            runner.logger.warning(
                f'mmsmart: training stopped at iteration {runner.iter}, before the search ended at '
                f'{self._end}. Nothing was pruned and no pruned.pth is written.'
            )
            return
        self._measure(runner)
        dense = runner.message_hub.runtime_info.get(_DENSE_METRICS, {})
        write_outcome(runner, self.masks, self._positions, self.method, dense, self._metrics)

    def _set_progress(self, runner: Runner, iteration: int) -> None:
        last = max(self._end - self._begin - 1, 1)
        progress = min((iteration - self._begin) / last, 1.0)
        self.masks.method.progress = progress
        runner.optim_wrapper.temperature = self.schedule(progress)

    def _begin_search(self, runner: Runner) -> None:
        model, masks = trained_model(runner), self.masks
        self._measure(runner)
        runner.message_hub.update_info(_DENSE_METRICS, self._metrics)
        init = masks.method.init or self.start.init
        importance = first_importance(runner, model, masks, init, self.start.batches)
        importance *= self.start.scale
        self._set_progress(runner, self._begin)
        if self.distillation:
            runner.optim_wrapper.distillation.begin()
        masks.begin(same_everywhere(importance), runner.optim_wrapper.temperature)
        expect_agreement(masks, f'at the beginning of the search, iteration {runner.iter},')
        self._show(runner)
        runner.logger.info(
            f'mmsmart: search over iterations {self._begin} to {self._end}: {masks.num_blocks} '
            f'blocks in {len(masks.layers)} layers; {len(masks.excluded)} layers left dense. '
            f'May stay: {"; ".join(map(str, masks.budgets))}.'
        )
        if masks.state == 'hard':
            self._is_hard(runner)

    def _is_hard(self, runner: Runner) -> None:
        masks = self.masks
        averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        expect_agreement(masks, f'at the end of the search, iteration {runner.iter + 1},')
        self._show(runner)
        for average in averages:
            masks.zero_pruned(average.module)
        recalibrate(runner, trained_model(runner), self.recalibrate, averages)
        forget_best_scores(runner)
        runner.logger.info(
            f'mmsmart: masks are hard from iteration {runner.iter + 1} on: '
            f'{masks.moved():.1%} of the blocks changed sides during the search. Kept: '
            + '; '.join(
                f'{cost:.8g} of {budget}' for cost, budget in zip(masks.kept_costs(), masks.budgets)
            )
        )

    def _show(self, runner: Runner) -> None:
        show_masks(runner, self.masks)
        self._shown = runner.iter

    def _measure(self, runner: Runner) -> None:
        """Validate now, unless the last validation was at this very iteration."""
        if runner.val_loop is None or self._metrics_iter == runner.iter:
            return
        with only_measuring(runner):
            runner.val_loop.run()
        runner.model.train()

    @staticmethod
    def _is_logged(runner: Runner, batch_idx: int) -> bool:
        return any(
            hook.every_n_inner_iters(batch_idx, hook.interval)
            or hook.end_of_epoch(runner.train_dataloader, batch_idx)
            for hook in runner.hooks
            if isinstance(hook, LoggerHook)
        )

    def _log(self, runner: Runner) -> None:
        masks = self.masks
        for name, value in (
            ('temperature', masks.temperature),
            ('sparsity', masks.soft_sparsity()),
            ('undecided', masks.undecided()),
            ('moved', masks.moved()),
        ):
            if value is not None:
                runner.message_hub.update_scalar(f'train/{name}', value)
