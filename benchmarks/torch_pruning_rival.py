"""Torch-Pruning's group-norm pruner in the place of SMART's search: same recipe, epochs and MACs.

    python benchmarks/torch_pruning_rival.py CONFIG --load-from dense.pth --macs 8208768

takes a config that prunes channels, leaves `smart` aside, and trains with the stock runner. The
pruner (Fang et al., DepGraph, arXiv 2301.12900; global, its defaults) either cuts at once and all
epochs fine-tune, or (`--sparse-epochs N`) trains the dense network for N epochs under its group
regulariser and cuts then. It removes channels in small steps until the MACs are met from below.
"""

from __future__ import annotations

import argparse

import torch
import torch_pruning as tp
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner

from mmsmart.cost import count_macs, count_positions
from mmsmart.engine.calibration import evaluating
from mmsmart.engine.raw_forward import RawForward
from mmsmart.engine.stock_tools import enable_inheritance

_STEPS = 400  # of global pruning from all channels to none


@OPTIM_WRAPPERS.register_module()
class RegularisedOptimWrapper(OptimWrapper):
    """Adds the gradient of the pruner's regulariser before each step, while there is one."""

    pruner = None

    def step(self, **kwargs) -> None:
        if self.pruner is not None:
            self.pruner.regularize(self.model)
        super().step(**kwargs)


@HOOKS.register_module()
class GroupNormPruning(Hook):
    """Regularises the first epochs, then cuts channels until the MACs are met."""

    def __init__(self, macs: int, shape: tuple[int, int], sparse_epochs: int) -> None:
        self.macs, self.sparse_epochs = macs, sparse_epochs
        self.images = torch.zeros(1, 3, *shape)

    def before_train(self, runner: Runner) -> None:
        raw = RawForward(runner.model)
        outputs = [module for name, module in runner.model.named_modules() if name == 'head.fc']
        self.pruner = tp.pruner.GroupNormPruner(
            runner.model,
            self.images,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=_STEPS,
            ignored_layers=outputs,
            forward_fn=lambda _, images: raw(images),
        )
        runner.model.train()
        runner.optim_wrapper.model = runner.model

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch < self.sparse_epochs:
            self.pruner.update_regularizer()
            runner.optim_wrapper.pruner = self.pruner
        elif runner.epoch == self.sparse_epochs:
            runner.optim_wrapper.pruner = None
            self._cut(runner)

    def _cut(self, runner: Runner) -> None:
        left = self._count(runner.model)
        for _ in range(_STEPS):
            if left <= self.macs:
                break
            self.pruner.step()
            left = self._count(runner.model)
        optimizer = runner.optim_wrapper.optimizer
        (group,) = optimizer.param_groups
        group['params'] = list(runner.model.parameters())
        optimizer.state.clear()
        runner.logger.info(f'cut to {left} MACs, {self.macs} were allowed')

    def _count(self, model: torch.nn.Module) -> int:
        with evaluating(model):
            positions = count_positions(model, lambda: RawForward(model)(self.images))
        return count_macs(model, positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('--load-from', required=True, help='checkpoint of the dense model')
    parser.add_argument('--macs', type=int, required=True, help='MACs that may stay')
    parser.add_argument('--shape', type=int, nargs=2, default=(32, 32), help='image size')
    parser.add_argument('--sparse-epochs', type=int, default=0)
    parser.add_argument('--work-dir', required=True)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    args = parser.parse_args()
    enable_inheritance()
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    config.work_dir, config.load_from = args.work_dir, args.load_from
    config.runner_type = 'Runner'
    config.optim_wrapper.type = 'RegularisedOptimWrapper'
    pruning = dict(
        type='GroupNormPruning',
        macs=args.macs,
        shape=tuple(args.shape),
        sparse_epochs=args.sparse_epochs,
    )
    config.custom_hooks = [*config.get('custom_hooks', []), pruning]
    Runner.from_cfg(config).train()


if __name__ == '__main__':
    main()
