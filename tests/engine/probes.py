"""What a training run in a test carries besides its config: witnesses, mishaps, odd data."""

from __future__ import annotations

import hashlib
import os
import random
import signal

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, MODELS, TRANSFORMS
from mmpretrain.models import ClsDataPreprocessor
from torch.utils.data import BatchSampler


@HOOKS.register_module()
class Witness(Hook):
    """Notes what every iteration trained with."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.notes = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        masks = getattr(_plain(runner.model), 'block_masks', None)
        inputs = data_batch['inputs']
        inputs = inputs if isinstance(inputs, torch.Tensor) else torch.stack(inputs)
        self.notes.append(
            dict(
                iter=runner.iter,
                data=hashlib.sha256(inputs.numpy().tobytes()).hexdigest(),
                labels=sorted(int(sample.gt_label) for sample in data_batch['data_samples']),
                state=masks and masks.state,
                temperature=masks and masks.temperature,
                mask=masks and masks.mask().tolist(),
                hard=masks and masks.state != 'dense' and masks.hard_mask().tolist(),
                moved=masks and masks.moved(),
                dense=_digest(getattr(runner.optim_wrapper, 'distillation', None)),
                lr=runner.optim_wrapper.get_lr()['lr'][0],
                importance_lr=_importance_lr(runner.optim_wrapper),
            )
        )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.notes[-1]['loss'] = float(outputs['loss'])


@HOOKS.register_module()
class Sigkill(Hook):
    """Ends the process without a word, before iteration `at`; at the length of the run, after it.

    By then the checkpoint and the validation that were due are done, and nothing else.
    """

    priority = 'HIGHEST'

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train(self, runner):
        if runner.iter == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Unfound(Hook):
    """Misses a file that no key of the config names."""

    def before_train(self, runner):
        raise FileNotFoundError('6 of 7')


@DATA_SAMPLERS.register_module()
class FixedBatches(BatchSampler):
    """A batch sampler such as detectors have: the loader itself then knows no batch size."""


@TRANSFORMS.register_module()
class Noise(BaseTransform):
    """Adds a random brightness, drawn from one of the three generators of a process."""

    def __init__(self, source: str) -> None:
        self.draw = {
            'python': random.random,
            'numpy': np.random.rand,
            'torch': lambda: torch.rand(()).item(),
        }[source]

    def transform(self, results):
        image = results['img'].astype(np.float32)
        results['img'] = (image * (0.5 + 0.5 * self.draw())).astype(np.uint8)
        return results


@MODELS.register_module()
class DoublePreprocessor(ClsDataPreprocessor):
    """Gives the model float64 images."""

    def forward(self, data, training=False):
        data = super().forward(data, training)
        data['inputs'] = data['inputs'].double()
        return data


def _plain(model):
    return getattr(model, 'module', model)


def _digest(teacher):
    state = teacher.state_dict() if teacher else {}
    return hashlib.sha256(b''.join(x.numpy().tobytes() for x in state.values())).hexdigest()


def _importance_lr(wrapper):
    optimizer = getattr(wrapper, 'importance_optimizer', None)
    return optimizer and optimizer.param_groups[0]['lr']
