"""Builders of models: with block masks installed, or with channels cut out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmsmart.budget import read_targets
from mmsmart.engine.calibration import traced
from mmsmart.install import install_masks
from mmsmart.latency import LatencyTable, read_table
from mmsmart.layer_rules import default_sparsity
from mmsmart.registry import MODELS
from mmsmart.shrink import read_structure, shrink


# A function and not a wrapping module: hooks and tools that reach into the model find it unchanged.
@MODELS.register_module(['SmartModel', 'SmartClassifier', 'SmartDetector', 'SmartSegmentor'])
def SmartModel(
    model: dict[str, Any] | nn.Module,
    sparsity: float | dict[str, Any] | None = None,
    block: Sequence[int] | str = (16, 8, 1, 1),
    resource: str = 'params',
    latency: LatencyTable | str | dict[str, Any] | None = None,
    shape: Sequence[int] = (224, 224),
    data_preprocessor: dict[str, Any] | None = None,
    **pruning: Any,
) -> nn.Module:
    """Build the upstream model and install block masks on it; what comes back *is* that model.

    Args:
        model: Config of the upstream model, or the model.
        sparsity: See :func:`mmsmart.install_masks`.
        block: The same.
        resource: What a plain `sparsity` counts: 'params', 'latency', or 'macs' of an image of
            this shape.
        latency: A latency table, or what :func:`mmsmart.latency.read_table` reads.
        shape: `(height, width)` of the image that is followed through the model, where MACs are
            counted or channels coupled.
        data_preprocessor: Handed on; a `Runner` gives what its config has beside the model.
        pruning: `layers` and `round_to` of :func:`mmsmart.install_masks`.
    """
    sparsity = default_sparsity(block) if sparsity is None else sparsity
    needs_macs = any(target.resource == 'macs' for target in read_targets(sparsity, resource))
    if latency is not None and not isinstance(latency, LatencyTable):
        latency = read_table(latency)
    if not isinstance(model, nn.Module):
        model = _built(model, data_preprocessor)
    # Some backbones freeze their first stages in `train()` and not before.
    learnt = traced(model.train(), block, needs_macs, shape)
    install_masks(model, sparsity, block, resource=resource, latency=latency, **learnt, **pruning)
    return model


@MODELS.register_module()
def ShrunkModel(
    model: dict[str, Any], structure: str, data_preprocessor: dict[str, Any] | None = None
) -> nn.Module:
    """Build the upstream model with the channels cut out that a `structure.json` says.

    Its weights come from the checkpoint that was saved with the structure, and from there alone: an
    `init_cfg` that names a dense checkpoint is not followed.

    Args:
        model: Config of the upstream model.
        structure: Path of `structure.json`.
        data_preprocessor: As for `SmartModel`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be read, or is that of another model.
    """
    read = read_structure(structure)
    built = _built(model, data_preprocessor)
    shrink(built, read, structure)
    for module in built.modules():
        if isinstance(module, BaseModule):
            module._is_init = True
    return built


def _built(model: dict[str, Any], data_preprocessor: dict[str, Any] | None) -> nn.Module:
    if data_preprocessor is not None and 'data_preprocessor' not in model:
        model = {**model, 'data_preprocessor': data_preprocessor}
    return MMENGINE_MODELS.build(model)
