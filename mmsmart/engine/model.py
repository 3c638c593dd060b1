"""Builder of a model with block masks installed."""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmsmart.masking import install_masks
from mmsmart.registry import MODELS


# A function and not a wrapping module: hooks and tools that reach into the model find it unchanged.
@MODELS.register_module(['SmartModel', 'SmartClassifier', 'SmartDetector', 'SmartSegmentor'])
def SmartModel(model: dict[str, Any] | nn.Module, **pruning: Any) -> nn.Module:
    """Build the upstream model and install block masks on it; what comes back *is* that model.

    Args:
        model: Config of the upstream model, or the model.
        pruning: `sparsity`, `block` and `layers` of :func:`mmsmart.install_masks`.
    """
    if not isinstance(model, nn.Module):
        model = MMENGINE_MODELS.build(model)
    # Some backbones freeze their first stages in `train()` and not before.
    install_masks(model.train(), **pruning)
    return model
