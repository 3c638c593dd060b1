"""What `tools/sensitivity.py` measures: the loss of a trained network with parts of it silent.

Every probe silences blocks, takes the loss of the same images again and puts the weights back.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from mmsmart.engine.calibration import evaluating, first_importance, traced_in
from mmsmart.engine.config import ImportanceStart, Smart, build
from mmsmart.engine.diagnosis import check_checkpoint
from mmsmart.engine.export import read_checkpoint
from mmsmart.engine.runner import SmartRunner
from mmsmart.export import plain
from mmsmart.install import install_masks, remove_masks
from mmsmart.masking import BlockMasks
from mmsmart.sensitivity import (
    Grid,
    Part,
    allowed_rise,
    fresh_statistics,
    parts_of,
    place_of,
    rules_from,
    silenced,
)

# Two processes may sum in another order; other images or weights differ by far more.
_SAME_LOSS = 1e-4
# What batch norms take their statistics from; more hardly changes them.
_STATISTICS_IMAGES = 64


class TrainedNet:
    """The network of a config with a checkpoint's weights, and the images its loss is taken over.

    Classifiers are measured on validation images. The validation pipelines of detectors and
    segmentors do not carry targets as the loss needs them: theirs are training images, drawn and
    augmented once, from a fixed seed.

    Args:
        config: A config such as train.py takes, with or without `smart`.
        checkpoint: Checkpoint of the trained network; `load_from` of the config if None.
        images: Number of images, 2 or more; all of them if there are fewer.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If none is named, or it is one of another model, or the config can't be used.
    """

    def __init__(
        self, config: Config, checkpoint: str | Path | None = None, images: int = 256
    ) -> None:
        if isinstance(images, bool) or not isinstance(images, int) or images < 2:
            raise ValueError(f'images: expected an integer above 1, got {images!r}.')
        checkpoint = str(checkpoint or config.get('load_from') or '')
        if not checkpoint or '://' in checkpoint:
            raise ValueError(
                f'checkpoint: {checkpoint or "none"} is no file. The loss of an untrained network '
                'says nothing: name the trained checkpoint as CHECKPOINT, or as `load_from` in the '
                'config (one that is an address has to be downloaded first).'
            )
        state, _ = read_checkpoint(checkpoint)
        self.smart: Smart = build(Smart, 'smart', plain(config.get('smart') or {}))
        if isinstance(self.smart.block, str) and ':' in self.smart.block:
            raise ValueError(
                f'smart.block: {self.smart.block!r} fixes the density of every layer, so there is '
                'nothing to choose. Measure blocks such as (16, 8, 1, 1), or channels.'
            )
        start = {k: x for k, x in self.smart.importance.items() if k in ('init', 'batches')}
        self._start = ImportanceStart(**start)
        self._runner = _quiet_runner(config)
        self._model = self._runner.model.train()  # some freeze their first stages only then
        self._norms = [
            module
            for module in self._model.modules()
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
        ]
        self._learnt: dict[bool, dict[str, Any]] = {}
        self._importance: dict[str, Tensor] = {}
        with self._installed('params', 0.0, self.smart.layers) as masks:
            check_checkpoint(self._model, masks, {'state_dict': state}, new_layers=False)
            self._model.load_state_dict(state, strict=False)
            self.parts: list[Part] = parts_of(masks)
        loader, self._training = _labelled(self._runner)
        self.data = 'training' if self._training else 'validation'
        self._batches = list(self._preprocessed(loader, images))
        self.images = sum(count for _, count in self._batches)
        self.settings = {
            'model': _digest([config.model, config.get('data_preprocessor')]),
            'checkpoint': _digest_of_state(state),
            'data': _digest([config.get(loader) for loader in self._loaders()]),
            'latency': _digest(self.smart.latency and asdict(self.smart.latency_table())),
            'images': self.images,
            **{key: plain(getattr(self.smart, key)) for key in ('block', 'round_to', 'layers')},
            'importance': [self._start.init, self._start.batches],
        }

    def _loaders(self) -> list[str]:
        """Which data decides: that of the loss, and that of the importance."""
        learnt = self._start.init in ('activation', 'gradient')
        loss = 'train_dataloader' if self._training else 'val_dataloader'
        return sorted({loss, 'train_dataloader'} if learnt else {loss})

    @property
    def asked(self) -> dict[str, Any]:
        """What the config says of blocks and layers, where it differs from the defaults."""
        default = Smart()
        keys = ('block', 'round_to', 'latency', 'layers')
        written = {key: getattr(self.smart, key) for key in keys}
        return {k: x for k, x in written.items() if plain(x) != plain(getattr(default, k))}

    def loss(self) -> float | None:
        """Mean loss of the images, norms with statistics of their own; None if not finite."""
        with evaluating(self._model), fresh_statistics(self._norms, self._feed):
            _seed()  # some losses sample boxes
            total = sum(self._loss_of(data) * count for data, count in self._batches)
        return total / self.images if math.isfinite(total) else None

    @contextmanager
    def masks(
        self, resource: str, sparsity: float, layers: Sequence[dict[str, Any]] | None = None
    ) -> Iterator[BlockMasks]:
        """Inside, the model has dense masks that hold the first importance.

        Args:
            resource: What the sparsity counts.
            sparsity: Share of it to remove.
            layers: Rules by name; those of the config if None.

        Raises:
            ValueError: If this sparsity can't be reached.
        """
        layers = self.smart.layers if layers is None else layers
        with self._installed(resource, sparsity, layers) as masks:
            which = json.dumps([[layer.name, layer.num_blocks] for layer in masks.layers])
            if which not in self._importance:
                with evaluating(self._model):
                    _seed()
                    self._importance[which] = first_importance(
                        self._runner, self._model, masks, self._start.init, self._start.batches
                    ).cpu()
            masks.importance.data = self._importance[which].clone()
            yield masks

    def shares(self, resource: str) -> dict[str, float]:
        """Share of a resource that leaves with each part of the network, if above 0."""
        found = {}
        with self._installed(resource, 0.0, self.smart.layers) as masks:
            for part in parts_of(masks):
                others = torch.ones(masks.num_blocks)
                others[part.blocks.start : part.blocks.stop] = 0
                found[part.name] = 1 - masks.plan.spent(others)[0] / masks.total_cost
        return {name: share for name, share in found.items() if share > 0}

    @contextmanager
    def _installed(
        self, resource: str, sparsity: float, layers: Sequence[dict[str, Any]]
    ) -> Iterator[BlockMasks]:
        arguments = {
            **self.smart.model_args(), 'sparsity': sparsity, 'resource': resource, 'layers': layers,
        }  # fmt: skip
        macs = resource == 'macs'
        if macs not in self._learnt:
            self._learnt[macs] = traced_in(self._runner, self._model, arguments['block'], macs)
        masks = install_masks(self._model, **arguments, **self._learnt[macs])
        try:
            yield masks
        finally:
            remove_masks(self._model)

    def _preprocessed(self, loader: DataLoader, images: int) -> Iterator[tuple[Any, int]]:
        """Once and for all: data samples may be changed in place on their way in."""
        with evaluating(self._model):
            _seed()
            for batch in _chosen(loader, images):
                data = self._model.data_preprocessor(batch, self._training)
                yield data, len(batch['inputs'])

    def _feed(self) -> None:
        seen = 0
        for data, count in self._batches:
            if seen >= _STATISTICS_IMAGES:
                break
            if count > 1 or not seen:
                self._model._run_forward(data, mode='loss')
            seen += count

    def _loss_of(self, data: Any) -> float:
        return float(self._model.parse_losses(self._model._run_forward(data, mode='loss'))[0])


def measure(
    net: TrainedNet, grid: Grid, allow: str | float, known: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of all probes: the dense net, each layer at each density, the whole net twice.

    The whole net first as the config has it, then with rules for its sensitive layers. A row says
    `what` ('dense', 'layer' or 'network'), where, the share `kept`, and the `loss`, None where it
    is not finite; a `sparsity` that can't be reached has a `reason` instead.

    Args:
        net: The network.
        grid: What is measured.
        allow: Rise of the loss that is allowed; see :func:`mmsmart.sensitivity.allowed_rise`.
        known: Rows of an earlier run, which are given back as they are.

    Raises:
        ValueError: If the dense loss is not finite, or not that of the known rows, or a resource
            can't be counted.
    """
    shares = {resource: net.shares(resource) for resource in grid.resources}
    known = {place_of(row): row for row in known}
    dense = {'what': 'dense', 'kept': 1.0, 'loss': net.loss()}
    if dense['loss'] is None:
        raise ValueError(f'The loss of the dense network over {net.images} images is not finite.')
    before = known.get(place_of(dense), dense)
    if not math.isclose(dense['loss'], before['loss'], rel_tol=_SAME_LOSS):
        raise ValueError(
            f'resume: the dense loss is {dense["loss"]:.6g}, and {before["loss"]:.6g} in the rows '
            'to go on from. The images have changed: start anew, without --resume.'
        )
    rows = [before]
    yield before
    with net.masks('params', 0.0) as masks:
        importance = masks.importance.detach()
        for part in net.parts:
            losses: dict[bytes, float | None] = {}  # small layers keep the same blocks twice
            for density in sorted(grid.densities, reverse=True):
                row = {'what': 'layer', 'name': part.name, 'density': density}
                if place_of(row) not in known:
                    kept = part.thinned(importance, density)
                    which = kept.numpy().tobytes()
                    if which not in losses:
                        with silenced(masks, kept):
                            losses[which] = net.loss()
                    row.update(kept=part.share(kept), loss=losses[which])
                rows.append(known.get(place_of(row), row))
                yield rows[-1]
    for resource in grid.resources:
        rules = rules_from(rows, shares[resource], allowed_rise(allow, before['loss']))
        for more in [[], rules] if rules else [[]]:
            for sparsity in sorted(grid.sparsities):
                row = {'what': 'network', 'resource': resource, 'sparsity': sparsity, 'rules': more}
                if place_of(row) not in known:
                    row.update(_whole(net, resource, sparsity, more))
                yield known.get(place_of(row), row)


def _whole(net: TrainedNet, resource: str, sparsity: float, rules: list) -> dict[str, Any]:
    try:
        with (
            net.masks(resource, sparsity, [*net.smart.layers, *rules]) as masks,
            silenced(masks, masks.hard_mask().bool()),
        ):
            return {'kept': masks.kept_cost() / masks.total_cost, 'loss': net.loss()}
    except ValueError as error:  # floors, or less than one block would stay
        return {'kept': None, 'loss': None, 'reason': str(error)}


def _quiet_runner(config: Config) -> SmartRunner:
    """A runner that is never run: its model and loaders are wanted, not its files."""
    config = config.copy()
    with tempfile.TemporaryDirectory() as folder:
        config.update(
            work_dir=folder, visualizer=None, log_level='ERROR', load_from=None, resume=False,
            smart=config.get('smart') or {}, randomness=dict(seed=0), launcher='none',
        )  # fmt: skip
        runner = SmartRunner.from_cfg(config)
        for handler in list(runner.logger.handlers):
            if getattr(handler, 'baseFilename', None):
                runner.logger.removeHandler(handler)
                handler.close()
    runner.message_hub.update_info('iter', 0)  # batch augmentations ask for it
    return runner


def _labelled(runner: SmartRunner) -> tuple[DataLoader, bool]:
    """The loader whose batches the loss takes, and whether it is that of the training."""
    if runner.val_loop is not None:
        loader = runner.val_dataloader
        sample = loader.dataset[0].get('data_samples')
        # The class of an image is right at any scale; boxes and maps are not.
        if sample is not None and 'gt_label' in sample:
            return loader, False
    return runner.train_dataloader, True


def _chosen(loader: DataLoader, images: int) -> DataLoader:
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))
    batch_size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    batch_size = max(batch_size, 2)  # a batch norm behind a global pooling needs two values
    dataset: Dataset = torch.utils.data.Subset(loader.dataset, order[:images].tolist())
    return DataLoader(dataset, batch_size, collate_fn=loader.collate_fn)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of_state(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
