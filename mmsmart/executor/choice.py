"""Which layers run over their kept blocks and which stay dense: whatever is faster here."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .forward import KERNELS, SparseForward, reason_for_dense, sparse_forwards
from .kernel import KernelUnavailable

_LAYERS = (nn.Conv2d, nn.Linear)
# Of the largest output. Halves are rounded once more than what they are compared with.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_GAIN = 1.05  # a gain that noise can feign is none
_WARMUP = 2

# Inputs of one layer: how often it is called with which shape, in channels-last order or not.
_Calls = Counter[tuple[tuple[int, ...], bool]]


@dataclass(frozen=True)
class Choice:
    """What became of one layer.

    Args:
        name: Name of the layer inside the model.
        backend: 'sparse' if it runs over its kept blocks, else 'dense'.
        reason: Why.
        density: Share of the weight that the sparse kernel visits; None if it was not packed.
        dense_ms: What the dense layer takes in one pass of the model; None if not measured.
        sparse_ms: What the sparse one takes.
    """

    name: str
    backend: Literal['dense', 'sparse']
    reason: str
    density: float | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None


def accelerate(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], rounds: int = 10
) -> list[Choice]:
    """Let each pruned layer skip its zero blocks wherever that is measured to be faster.

    Every Conv2d and Linear whose weight has whole blocks of zeros is timed, dense and sparse in
    turn, at the shapes that it meets in `model(*example_inputs)`. Where sparse wins, the layer's
    `forward` is replaced; its parameters, type and name stay, so `state_dict()` does too. The
    weights are packed once: change them, and their layers run dense until this is called again.

    Sparse layers compute in float32 on the CPU, through a C++ kernel, and in float32, float16 or
    bfloat16 on CUDA devices, through one in Triton; and without gradients. All else falls back to
    dense call by call. Times hold for this device, the present `torch.get_num_threads()`, batch
    size and memory format; channels last suits it best: call
    `model.to(memory_format=torch.channels_last)`.

    Args:
        model: A model in evaluation mode. Changed in place; :func:`restore` undoes it.
        example_inputs: An image batch, or the positional arguments of the model.
        rounds: How often each layer is timed.

    Returns:
        What became of every Conv2d and Linear, in the order of `model.named_modules()`.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If it is in training mode, or `rounds` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()
        >>> accelerate(model, torch.zeros(1, 3, 8, 8))[0].reason
        'no block of the weight is zero'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: expected a torch.nn.Module, got {type(model).__name__}.')
    if model.training:
        raise ValueError(
            'model: it is in training mode, where a pass over the example inputs would change it. '
            'Call model.eval() first.'
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f'rounds: expected an integer of at least 1, got {rounds!r}.')
    restore(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    reasons = {name: reason_for_dense(layer) for name, layer in layers.items()}
    with torch.inference_mode():
        calls = _calls(model, example_inputs, layers)
        forwards = {
            name: sparse_forwards(layer) for name, layer in layers.items() if reasons[name] is None
        }
        reasons |= _without_kernel(forwards)
        return [
            Choice(name, 'dense', reasons[name])
            if reasons[name]
            else _choose(name, forwards[name], calls[name], rounds)
            for name in layers
        ]


def restore(model: nn.Module) -> None:
    """Give every layer of the model its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get('forward'), SparseForward):
            del module.forward


def table(choices: Sequence[Choice]) -> str:
    """The choices as a Markdown table, with the time of all measured layers in the last row.

    Example:
        >>> print(table([Choice('fc', 'sparse', 'faster', 0.2, 3.0, 1.0)]))
        | layer | density | dense ms | sparse ms | speed-up | runs | because |
        | --- | ---: | ---: | ---: | ---: | --- | --- |
        | fc | 0.20 | 3.000 | 1.000 | 3.00 | sparse | faster |
        | all that were measured | | 3.000 | 1.000 | 3.00 | | |
    """
    rows = [
        '| layer | density | dense ms | sparse ms | speed-up | runs | because |',
        '| --- | ---: | ---: | ---: | ---: | --- | --- |',
    ]
    dense = taken = 0.0
    for choice in choices:
        density = '' if choice.density is None else f'{choice.density:.2f}'
        times = ' | | '
        if choice.dense_ms is not None and choice.sparse_ms is not None:
            dense += choice.dense_ms
            taken += choice.sparse_ms if choice.backend == 'sparse' else choice.dense_ms
            times = (
                f'{choice.dense_ms:.3f} | {choice.sparse_ms:.3f} | '
                f'{choice.dense_ms / choice.sparse_ms:.2f}'
            )
        rows.append(f'| {choice.name} | {density} | {times} | {choice.backend} | {choice.reason} |')
    if taken:
        total = f'{dense:.3f} | {taken:.3f} | {dense / taken:.2f}'
        rows.append(f'| all that were measured | | {total} | | |')
    return '\n'.join(rows)


def _calls(model: nn.Module, inputs: Any, layers: dict[str, nn.Module]) -> dict[str, _Calls]:
    """With which inputs each layer is called in one pass of the model."""
    calls: dict[str, _Calls] = {name: Counter() for name in layers}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                images = args[0]
                calls[name][tuple(images.shape), not images.is_contiguous()] += 1

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        model(*([inputs] if isinstance(inputs, Tensor) else inputs))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _without_kernel(forwards: dict[str, list[SparseForward]]) -> dict[str, str]:
    """Why layers stay dense whose device has no kernel, with a warning for each such device."""
    reasons: dict[str, str] = {}
    for device, kernel in KERNELS.items():
        names = [n for n, own in forwards.items() if own[0].layer.weight.device.type == device]
        if all(_density(forwards[name]) == 1 for name in names):
            continue
        try:
            kernel.compiled()
        except KernelUnavailable as error:
            warnings.warn(
                f'mmsmart.executor: all layers on {device} stay dense: {error}', stacklevel=3
            )
            reasons |= dict.fromkeys(names, _no_kernel(error))
    return reasons


def _density(forwards: list[SparseForward]) -> float:
    """That of the finest packing: 1 if no block is zero."""
    return min(forward.packed.density for forward in forwards)


def _no_kernel(error: KernelUnavailable) -> str:
    """What is missing, short enough for a row of the table."""
    return f'no kernel on this machine: {str(error).splitlines()[0].split(":")[0]}'


def _choose(name: str, forwards: list[SparseForward], calls: _Calls, rounds: int) -> Choice:
    """Measure one layer, and replace its forward by the fastest of these if that pays."""
    layer, density = forwards[0].layer, _density(forwards)
    if density == 1:
        return Choice(name, 'dense', 'no block of the weight is zero', density)
    if not calls:
        return Choice(name, 'dense', 'the example inputs do not reach it', density)
    dense, sparse = 0.0, dict.fromkeys(forwards, 0.0)
    for (shape, channels_last), count in calls.items():
        images = torch.rand(shape, dtype=layer.weight.dtype, device=layer.weight.device)
        if channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        wrong = {forward: reason for forward in sparse if (reason := _fault(forward, images))}
        sparse = {forward: taken for forward, taken in sparse.items() if forward not in wrong}
        if not sparse:
            return Choice(name, 'dense', next(iter(wrong.values())), density)
        times = _milliseconds([forwards[0].dense, *sparse], images, rounds)
        dense += count * times[0]
        sparse = {f: taken + count * own for (f, taken), own in zip(sparse.items(), times[1:])}
    fastest = min(sparse, key=sparse.__getitem__)
    density, taken = fastest.packed.density, sparse[fastest]
    if dense < _GAIN * taken:
        return Choice(name, 'dense', 'sparse is not faster', density, dense, taken)
    layer.forward = fastest
    return Choice(name, 'sparse', 'faster', density, dense, taken)


def _fault(forward: SparseForward, images: Tensor) -> str | None:
    """Why the layer can not run this way: the kernel fails, or its outputs are others."""
    if images.is_cuda:
        # Torch may round float32 to TF32 there, which is no reference.
        layer = copy.deepcopy(forward.layer).double()
        expected = type(layer).forward(layer, images.double())
    else:
        expected = forward.dense(images)
    try:
        error = float((forward(images) - expected).abs().max())
    except KernelUnavailable as failure:
        return _no_kernel(failure)
    within = _TOLERANCE[images.dtype] * float(expected.abs().max())
    return None if error <= within else f'the outputs would differ by {error:.1e}'


def _milliseconds(
    candidates: Sequence[Callable[[Tensor], Tensor]], images: Tensor, rounds: int
) -> list[float]:
    """Fastest time of each, in turn: slower rounds tell what else the machine did meanwhile.

    Those of a GPU begin and end with nothing left for it to do, launching included.
    """
    seconds: list[list[float]] = [[] for _ in candidates]
    for i in range(-_WARMUP, rounds):
        for candidate, own in zip(candidates, seconds):
            _wait_for(images.device)
            begin = time.perf_counter()
            candidate(images)
            _wait_for(images.device)
            if i >= 0:
                own.append(time.perf_counter() - begin)
    return [1000 * min(own) for own in seconds]


def _wait_for(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
