"""Distillation: the features of the pruned network stay near those of the dense one.

A frozen copy of the backbone, made as the search begins, sees the same batches, and the loss gets a
term for how far the features have moved away from its own. Feature maps are what classifiers,
detectors and segmentors have in common; nothing is asked of their heads.

Sources: Hinton et al., arXiv 1503.02531 (a network learns from another one's outputs); FitNets,
Romero et al., arXiv 1412.6550, section 2.2 (it learns from features, by their squared difference).
Here the difference is divided by the mean square of the dense features, which makes one weight fit
networks and stages of any scale.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.engine.config import build
from mmsmart.engine.processes import same_everywhere

# The least mean square to divide by: features that are zero have no scale.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Distillation:
    """`smart.distillation`: what a relative distance of 1 between the features adds to the loss."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(
                f'smart.distillation.weight: expected a number above 0, got {weight!r}. Without '
                'distillation, leave smart.distillation out.'
            )


def read_distillation(written: float | dict[str, Any] | None) -> Distillation | None:
    """The settings that `smart.distillation` stands for, a number being the weight.

    Raises:
        ValueError: For a weight that is not above 0, or an unknown key.

    Example:
        >>> read_distillation(0.5)
        Distillation(weight=0.5)
    """
    if written is None:
        return None
    written = written if isinstance(written, dict) else {'weight': written}
    return build(Distillation, 'smart.distillation', written)


class DenseFeatures:
    """The dense network's features, kept beside a model, and the distance of the model's from them.

    Nothing of it belongs to the model: no submodule, no state-dict key, and hooks only inside
    :meth:`compared`.

    Args:
        model: A model with a `backbone`, before its forward passes.
        weight: Factor of the distance in the loss.

    Raises:
        ValueError: If the model has no backbone.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0) -> None:
        if not isinstance(getattr(model, 'backbone', None), nn.Module):
            raise ValueError(
                f'smart.distillation: {type(model).__name__} has no `backbone`, whose features '
                'would be compared. Leave smart.distillation out.'
            )
        self.weight = weight
        self.begun = False
        self._backbone = model.backbone
        # Now, and filled later: what a forward pass may leave on a module can't always be copied.
        self._dense = copy.deepcopy(model.backbone).requires_grad_(False)
        self._dense.eval()  # which gives nothing back where `train` is one of OpenMMLab's
        self._distances: list[Tensor] = []

    def begin(self) -> None:
        """The dense network is the one that the model is now, in every process the first one's."""
        self._dense.load_state_dict(self._backbone.state_dict())
        for tensor in self._dense.state_dict().values():  # running statistics differ
            same_everywhere(tensor)
        self.begun = True

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Inside, each forward pass of the backbone with gradients is compared, once begun."""
        self._distances = []
        if not self.begun:
            yield
            return
        wanted: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Before, while the model's own activations take no memory yet.
            if torch.is_grad_enabled():
                with torch.no_grad():
                    wanted.append(self._dense(*args, **kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
            if torch.is_grad_enabled():
                self._distances.append(feature_distance(given, wanted.pop()))

        handles = [
            self._backbone.register_forward_pre_hook(before, with_kwargs=True),
            self._backbone.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def distance(self) -> Tensor:
        """Mean distance over the forward passes of this training step, with its gradient.

        Raises:
            RuntimeError: If the backbone was not called.
        """
        distances, self._distances = self._distances, []
        if not distances:
            raise RuntimeError(
                'smart.distillation: the training step never called the backbone, or not inside '
                '`optim_wrapper.optim_context`. Leave smart.distillation out.'
            )
        return torch.stack(distances).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and statistics of the dense network; empty before :meth:`begin`."""
        return dict(self._dense.state_dict()) if self.begun else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the dense network of :meth:`state_dict`."""
        self.begun = bool(state)
        if self.begun:
            self._dense.load_state_dict(state)


def feature_distance(given: Any, wanted: Any) -> Tensor:
    """Mean squared difference over the mean square of what is wanted, averaged over feature maps.

    Args:
        given: A tensor, or tuples, lists and dictionaries of them; the gradient goes here.
        wanted: The same of the dense network. What only one of the two has is left out.

    Returns:
        A scalar of at least 0, in float32 or above.

    Raises:
        ValueError: If they have no feature map in common.

    Example:
        >>> given, wanted = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> feature_distance((given, wanted), (wanted, wanted))
        tensor(0.5000)
    """
    dense = dict(_feature_maps(wanted))
    ratios = []
    for place, x in _feature_maps(given):
        target = dense.get(place)
        if target is not None and target.shape == x.shape:
            kind = torch.promote_types(x.dtype, torch.float32)
            x, target = x.to(kind), target.to(kind)
            scale = target.square().mean().clamp_min(_SMALLEST)
            ratios.append((x - target).square().mean() / scale)
    if not ratios:
        raise ValueError(
            'smart.distillation: in training and in evaluation the backbone gives no feature map '
            'of the same shape, so none can be compared. Leave smart.distillation out.'
        )
    return torch.stack(ratios).mean()


def _feature_maps(outputs: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        yield place, outputs
    elif isinstance(outputs, (dict, list, tuple)):
        items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
        for key, output in items:
            yield from _feature_maps(output, (*place, key))
