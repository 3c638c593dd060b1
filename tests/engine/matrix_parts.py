"""Parts for the runs of the matrix: what CPUs lack, and models with odd habits."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import signal
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook, checkpoint_hook
from mmengine.registry import HOOKS, MODELS
from torch import nn
from torch.distributed.nn.functional import all_reduce


@MODELS.register_module()
class IdleNeck(nn.AdaptiveAvgPool2d):
    """Pools, and has a layer that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__(1)
        self.idle = nn.Linear(8, 8)

    def forward(self, inputs):
        return tuple(super(IdleNeck, self).forward(x).flatten(1) for x in inputs)


@HOOKS.register_module()
class Recomputing(Hook):
    """Activation checkpointing without reentrant autograd, which MMEngine has no key for."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def before_train(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        for name in self.modules:
            module = model.get_submodule(name)
            module.forward = functools.partial(
                torch.utils.checkpoint.checkpoint, module.forward, use_reentrant=False
            )


@HOOKS.register_module()
class BrokenImages(Hook):
    """Gives the model images of NaN in one iteration."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            data_batch['inputs'] = torch.full_like(
                data_batch['inputs'], torch.nan, dtype=torch.float32
            )


@HOOKS.register_module()
class FullDisk(Hook):
    """From this iteration on no file may become longer than what logs need."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, most))


@HOOKS.register_module()
class DiesWhileSaving(Hook):
    """Is killed at a moment of its n-th save."""

    priority = 'LOWEST'

    def __init__(self, moment: str, save: int) -> None:
        self.moment, self.save, self.saves = moment, save, 0

    def before_train(self, runner):
        put = LocalBackend.put

        def counted(backend, content, path):
            self.saves += 1
            if self._is_due('before it is opened'):
                _die()
            if self._is_due('half written'):
                with open(path, 'wb') as file:
                    file.write(content[: len(content) // 2])
                _die()
            put(backend, content, path)

        def noted(path, *mode):
            if self._is_due('before it is noted'):
                _die()
            file = open(path, *mode)  # noqa: SIM115
            if self._is_due('while it is noted'):
                _die()
            return file

        def flushed(number):
            if self._is_due('before it has its name'):
                _die()

        unlink = Path.unlink

        def deleted(path, **settings):
            if self._is_due('before the old one is deleted') and path.suffix == '.pth':
                _die()
            unlink(path, **settings)

        LocalBackend.put = counted
        checkpoint_hook.open = noted
        os.fsync = flushed
        Path.unlink = deleted

    def _is_due(self, moment: str) -> bool:
        return self.saves == self.save and self.moment == moment


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pretend_to_have_a_gpu() -> None:
    """MMEngine's mixed precision asks for one; autocast and loss scaling work without."""
    from mmengine.optim.optimizer import amp_optimizer_wrapper as amp

    amp.is_cuda_available = lambda: True
    amp.GradScaler = functools.partial(torch.amp.GradScaler, device='cpu')
    # MMEngine lets a CPU have bfloat16 only; torch lets it have float16 too.
    casting = importlib.import_module('mmengine.runner.amp')
    casting.autocast = lambda dtype: torch.autocast('cpu', dtype=dtype)


def let_cpus_synchronise_statistics() -> None:
    """`sync_bn`, for which torch has GPU kernels only, by the same formulas."""
    from mmengine.runner import runner

    runner.convert_sync_batchnorm = _converted


def _converted(model: nn.Module, implementation: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SynchronisedNorm
    return model


class SynchronisedNorm(nn.BatchNorm2d):
    """Normalises by the statistics of all processes together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        world = torch.distributed.get_world_size()
        moments = torch.cat([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = (all_reduce(moments) / world).chunk(2)
        var, count = square - mean.square(), x.numel() / x.shape[1] * world
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]
