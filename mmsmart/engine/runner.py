"""The runner behind the one-base-file use: a stock config plus `smart` becomes a pruning run."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

from mmsmart.engine.calibration import traced_in
from mmsmart.engine.complete_checkpoints import CompleteCheckpoints
from mmsmart.engine.config import Smart, build
from mmsmart.engine.diagnosis import data_named, emptiness_named, scope_named
from mmsmart.engine.max_drop import SparsitySearch
from mmsmart.engine.optim_wrapper import MaskedStep
from mmsmart.engine.processes import refuse_shards, start_on_cpus, without_gpus
from mmsmart.engine.pruning_hook import SmartPruningHook
from mmsmart.engine.runner_models import trained_model
from mmsmart.install import install_masks, masks_of
from mmsmart.registry import RUNNERS

_MASKED_WRAPPERS = {
    'OptimWrapper': 'mmsmart.SmartOptimWrapper',
    'AmpOptimWrapper': 'mmsmart.SmartAmpOptimWrapper',
}


@RUNNERS.register_module()
class SmartRunner(CompleteCheckpoints, Runner):
    """A `Runner` that reads `smart` from its config and puts the three parts of pruning in place.

    The config itself is left as it was written, so what is dumped to `work_dir` describes the
    stock model. Parts that the config names itself are kept. Testing is untouched.
    """

    @classmethod
    def from_cfg(cls, cfg: ConfigDict | Config | dict[str, Any]) -> SmartRunner:
        """Build the runner; a wrong `smart` is refused before anything is written.

        Raises:
            ValueError: If `smart` is missing, or one of its values can't be used, or if the types
                in the config are not those of `default_scope`.
        """
        expect_pruning(cfg)
        with scope_named(cfg):
            return super().from_cfg(cfg)

    def train(self) -> nn.Module:
        """Train; an error over missing data or a type of another scope names the config's key.

        With `smart.max_drop`, short runs find the sparsity before.
        """
        with scope_named(self.cfg), data_named(self.cfg):
            smart = _smart_of(self.cfg)
            if smart.max_drop is None:
                return super().train()
            search = SparsitySearch(self, smart)
            self.cfg.smart.update(sparsity=search.settle(), max_drop=None)
            model = super().train()
            search.conclude()
            return model

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        if self.distributed and without_gpus():
            start_on_cpus(self.launcher, env_cfg.get('dist_cfg', {}))
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if model_wrapper_cfg is not None:
            refuse_shards('model_wrapper_cfg.type', model_wrapper_cfg.get('type', ''))
        if self.distributed and without_gpus() and not is_model_wrapper(model):
            stock = dict(
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False),
            )
            model_wrapper_cfg = dict(model_wrapper_cfg or stock, device_ids=None)
        return super().wrap_model(model_wrapper_cfg, model)

    def build_train_loop(self, loop: Any) -> BaseLoop:
        with emptiness_named(self.cfg, 'train_dataloader'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: Any) -> BaseLoop:
        with emptiness_named(self.cfg, 'val_dataloader'):
            return super().build_val_loop(loop)

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        default_hooks = dict(default_hooks or {})
        written = default_hooks.get('checkpoint', dict(type='CheckpointHook'))
        if isinstance(written, dict) and written.get('type') == 'CheckpointHook':
            default_hooks['checkpoint'] = {**written, 'type': 'mmsmart.SmartCheckpointHook'}
        super().register_hooks(default_hooks, custom_hooks)
        if not any(isinstance(hook, SmartPruningHook) for hook in self.hooks):
            self.register_hook(SmartPruningHook(**_smart_of(self.cfg).hook_args()))

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        model = trained_model(self)
        if masks_of(model) is None:
            # Some backbones freeze their first stages in `train()` and not before.
            arguments = _smart_of(self.cfg).model_args()
            needs_macs = any(t.resource == 'macs' for t in _smart_of(self.cfg).targets())
            learnt = traced_in(self, model.train(), arguments['block'], needs_macs)
            install_masks(model.train(), **arguments, **learnt)
        if isinstance(optim_wrapper, dict):
            optim_wrapper = self._masked(optim_wrapper)
        return super().build_optim_wrapper(optim_wrapper)

    def _masked(self, optim_wrapper: dict[str, Any]) -> dict[str, Any]:
        written = optim_wrapper.get('type', 'OptimWrapper')
        name = written if isinstance(written, str) else written.__name__
        name = name.removeprefix('mmengine.')
        if name in _MASKED_WRAPPERS.values() or (
            isinstance(written, type) and issubclass(written, MaskedStep)
        ):
            return optim_wrapper
        if name not in _MASKED_WRAPPERS:
            raise ValueError(
                f'optim_wrapper.type: {name!r} would train past the masks. Pruning works with '
                f'{sorted(_MASKED_WRAPPERS)}, which it replaces by its own.'
            )
        masked = copy.deepcopy(optim_wrapper)
        masked['type'] = _MASKED_WRAPPERS[name]
        masked.update(_smart_of(self.cfg).optimizer_args())
        return masked


def expect_pruning(cfg: ConfigDict | Config | dict[str, Any]) -> None:
    """Check all of a pruning config that can be checked without its model and data.

    Raises:
        ValueError: As :meth:`SmartRunner.from_cfg`.
    """
    smart = _smart_of(cfg)
    if cfg.get('strategy') is not None:
        refuse_shards('strategy', cfg['strategy'])
    SmartPruningHook(**smart.hook_args())
    smart.optimizer_args()


def _smart_of(cfg: ConfigDict | Config | dict[str, Any]) -> Smart:
    smart = cfg.get('smart')
    if smart is None:
        raise ValueError(
            "smart: missing from the config, though runner_type is 'mmsmart.SmartRunner'. Add "
            'the base file `_base_/smart.py` to `_base_`, or write smart = dict(sparsity=0.5).'
        )
    if isinstance(smart, ConfigDict):
        smart = smart.to_dict()
    return build(Smart, 'smart', smart)
