"""Distillation: the pruned network stays near the dense one, in its outputs or in its features.

A frozen copy of the network, made as the search begins, sees the same batches, and the loss gets a
term for how far outputs or features have moved away from its own. Tensors are what classifiers,
detectors and segmentors have in common; nothing is asked of their losses.

Sources: Hinton et al., arXiv 1503.02531 (a network learns from another one's outputs); Kim et al.,
arXiv 2105.08919 (for which the squared difference of class scores does as well as the divergence of
their softmax, or better); FitNets, Romero et al., arXiv 1412.6550, section 2.2 (it learns from
features, by their squared difference). Here the difference is divided by the mean square of what
the dense network gives, which makes one weight fit networks, stages and heads of any scale.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.engine.config import build
from mmsmart.engine.processes import same_everywhere
from mmsmart.engine.raw_forward import RawForward, last_layers

# The least mean square to divide by: features that are zero have no scale.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Distillation:
    """`smart.distillation`: what a relative distance of 1 from the dense network adds to the loss.

    Args:
        weight: That, above 0.
        of: What is compared: the network's `'outputs'`, or the `'features'` of the backbone.
    """

    weight: float = 5.0
    of: str = 'outputs'

    def __post_init__(self) -> None:
        weight = self.weight
        held = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (held and 0 < weight < math.inf):
            raise ValueError(
                f'smart.distillation.weight: expected a number above 0, got {weight!r}. Without '
                'distillation, leave smart.distillation out.'
            )
        if self.of not in tuple(TEACHERS):  # of a tuple, anything may be asked
            raise ValueError(
                f'smart.distillation.of: got {self.of!r}, allowed are {tuple(TEACHERS)}.'
            )

    def teacher(self, model: nn.Module) -> Teacher:
        """What compares a model with the dense network that it is now."""
        return TEACHERS[self.of](model, self.weight)


def read_distillation(written: float | dict[str, Any] | None) -> Distillation | None:
    """The settings that `smart.distillation` stands for, a number being the weight.

    Raises:
        ValueError: For a weight that is not above 0, or an unknown key.

    Example:
        >>> read_distillation(0.5)
        Distillation(weight=0.5, of='outputs')
    """
    if written is None:
        return None
    written = written if isinstance(written, dict) else {'weight': written}
    return build(Distillation, 'smart.distillation', written)


class Teacher(ABC):
    """The dense network, kept beside a model, and the distance of the model from it.

    Nothing of it belongs to the model: no submodule, no state-dict key, and hooks only inside
    :meth:`compared`. Subclasses say what is compared.

    Args:
        taught: The model, or the part of it that is compared, before its forward passes.
        weight: Factor of the distance in the loss.
    """

    _called = 'model'

    def __init__(self, taught: nn.Module, weight: float) -> None:
        self.weight = weight
        self.begun = False
        self._taught = taught
        # Now, and filled later: what a forward pass may leave on a module can't always be copied.
        self._dense = copy.deepcopy(taught).requires_grad_(False)
        self._dense.eval()  # which gives nothing back where `train` is one of OpenMMLab's
        self._distances: list[Tensor] = []

    def begin(self) -> None:
        """The dense network is the one that the model is now, in every process the first one's."""
        self._dense.load_state_dict(self._taught.state_dict())
        for tensor in self._dense.state_dict().values():  # running statistics differ
            same_everywhere(tensor)
        self.begun = True

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Inside, each forward pass of the model with gradients is compared, once begun."""
        self._distances = []
        with ExitStack() as hooks:
            if self.begun:
                self._watch(hooks)
            else:
                self._try(hooks)
            yield

    def _try(self, hooks: ExitStack) -> None:  # noqa: B027, some have nothing to try
        """Before :meth:`begin`: refuse a model that can't be compared while little is lost."""

    @abstractmethod
    def _watch(self, hooks: ExitStack) -> None:
        """Put hooks on the model that add a distance for each forward pass with gradients."""

    def distance(self) -> Tensor:
        """Mean distance over the forward passes of this training step, with its gradient.

        Raises:
            RuntimeError: If what is compared was not called.
        """
        distances, self._distances = self._distances, []
        if not distances:
            raise RuntimeError(
                f'smart.distillation: the training step never called the {self._called}, or not '
                'inside `optim_wrapper.optim_context`. Leave smart.distillation out.'
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


class DenseFeatures(Teacher):
    """Compares the feature maps that the backbone gives.

    Args:
        model: A model with a `backbone`.
        weight: Factor of the distance in the loss.

    Raises:
        ValueError: If the model has no backbone.
    """

    _called = 'backbone'

    def __init__(self, model: nn.Module, weight: float) -> None:
        if not isinstance(getattr(model, 'backbone', None), nn.Module):
            raise ValueError(
                f'smart.distillation: {type(model).__name__} has no `backbone`, whose features '
                'would be compared. Leave smart.distillation out.'
            )
        super().__init__(model.backbone, weight)

    def _watch(self, hooks: ExitStack) -> None:
        wanted: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Before, while the model's own activations take no memory yet.
            if torch.is_grad_enabled():
                with torch.no_grad():
                    wanted.append(self._dense(*args, **kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
            if torch.is_grad_enabled():
                self._distances.append(feature_distance(given, wanted.pop()))

        _hook(hooks, self._taught.register_forward_pre_hook(before, with_kwargs=True))
        _hook(hooks, self._taught.register_forward_hook(after))


class DenseOutputs(Teacher):
    """Compares what the last layers give: class scores, boxes, maps of class scores.

    The last layers are found on the first batch: those whose results are what
    :class:`mmsmart.engine.raw_forward.RawForward` gives. An output that is computed out of a
    layer's result, as by an exponential, is not compared.

    Args:
        model: A model of OpenMMLab's, whose forward pass takes `inputs`.
        weight: Factor of the distance in the loss.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        super().__init__(model, weight)
        self._last: list[str] = []

    def _watch(self, hooks: ExitStack) -> None:
        wanted: list[dict[str, list[Tensor]]] = []
        given: dict[str, list[Tensor]] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                given.clear()
                wanted.append(self._wanted(*self._batch(args, kwargs)))
                _record(passing, self._taught, self._last, given)

        def after(module: nn.Module, args: tuple[Any, ...], losses: Any) -> None:
            if torch.is_grad_enabled():
                passing.close()
                self._distances.append(feature_distance(given, wanted.pop()))

        passing = hooks.enter_context(ExitStack())  # hooks of one forward pass
        _hook(hooks, self._taught.register_forward_pre_hook(before, with_kwargs=True))
        _hook(hooks, self._taught.register_forward_hook(after))

    def _try(self, hooks: ExitStack) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._find_last(*self._batch(args, kwargs))

        if not self._last:
            _hook(hooks, self._taught.register_forward_pre_hook(before, with_kwargs=True))

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Images and data samples of a forward pass: what was padded of an image is in these."""
        named = dict(zip(('inputs', 'data_samples'), args), **kwargs)
        if not isinstance(named.get('inputs'), Tensor):
            raise self._refused('Its forward pass takes no tensor of `inputs`.')
        return named['inputs'], named.get('data_samples')

    @torch.no_grad()
    def _wanted(self, inputs: Tensor, samples: Any) -> dict[str, list[Tensor]]:
        if not self._last:
            self._find_last(inputs, samples)
        outputs: dict[str, list[Tensor]] = {}
        with ExitStack() as hooks:
            _record(hooks, self._dense, self._last, outputs)
            RawForward(self._dense).named_outputs(inputs, samples)
        return outputs

    def _find_last(self, inputs: Tensor, samples: Any) -> None:
        try:
            self._last = last_layers(
                RawForward(self._dense), inputs[:1], None if samples is None else samples[:1]
            )
        except Exception as error:  # whatever a model says that does not work without its losses
            raise self._refused(f'({type(error).__name__}: {error})') from error

    def _refused(self, reason: str) -> ValueError:
        return ValueError(
            f"smart.distillation.of: 'outputs' of {type(self._taught).__name__} can't be compared. "
            f"{reason} Write smart.distillation.of='features'."
        )


def _record(
    hooks: ExitStack, model: nn.Module, layers: list[str], results: dict[str, list[Tensor]]
) -> None:
    """Add the results of these layers, call by call, as long as the hooks are there."""
    for name in layers:

        def add(module: nn.Module, args: Any, result: Tensor, name: str = name) -> None:
            results.setdefault(name, []).append(result)

        _hook(hooks, model.get_submodule(name).register_forward_hook(add))


def _hook(hooks: ExitStack, handle: torch.utils.hooks.RemovableHandle) -> None:
    hooks.callback(handle.remove)


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
            'smart.distillation: in training and in evaluation the model gives no feature map of '
            'the same shape, so none can be compared. Choose another smart.distillation.of, or '
            'leave smart.distillation out.'
        )
    return torch.stack(ratios).mean()


def _feature_maps(outputs: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        yield place, outputs
    elif isinstance(outputs, (dict, list, tuple)):
        items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
        for key, output in items:
            yield from _feature_maps(output, (*place, key))


TEACHERS: dict[str, type[Teacher]] = {'outputs': DenseOutputs, 'features': DenseFeatures}
