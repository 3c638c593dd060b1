"""Write what a pruned model is handed on as; a file is complete or it is not there."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.install import masks_of
from mmsmart.masking import BlockMasks
from mmsmart.shrink import cut_channels, structure_of


def save_plain_checkpoint(
    model: nn.Module, path: str | Path, meta: dict[str, Any] | None = None
) -> None:
    """Save a checkpoint that the stock model loads with `strict=True`, without mmsmart.

    The file holds `{'state_dict': ..., 'meta': ...}` as every OpenMMLab checkpoint does, and loads
    with `weights_only=True`.

    Args:
        model: A model whose masks are folded into its weights (hard), or without masks.
        path: The file to write.
        meta: Further entries, such as `dataset_meta`; arrays in it become lists.
    """
    state = {key: value.detach().cpu() for key, value in stock_state(model).items()}
    with complete_or_absent(path) as temporary:
        torch.save({'state_dict': state, 'meta': plain(meta or {})}, temporary)


def save_shrunk(
    model: nn.Module, masks: BlockMasks, folder: str | Path, meta: dict[str, Any] | None = None
) -> None:
    """Write `shrunk.pth`, a model with pruned channels cut out, and the `structure.json` it needs.

    Args:
        model: The model, or a copy of it, with its pruned weights at zero.
        masks: Hard masks over coupled channels.
        folder: Where the two files go.
        meta: Further entries of the checkpoint, such as `dataset_meta`.
    """
    kept = masks.plan.kept_channels(masks.hard_mask().bool())
    structure = structure_of(model, kept)
    small = copy.deepcopy(model)
    cut_channels(small, kept)
    state = {key: value for key, value in small.state_dict().items() if key in masks.stock_keys}
    state = {key: value.detach().cpu() for key, value in state.items()}
    with complete_or_absent(Path(folder) / 'structure.json') as temporary:
        temporary.write_text(json.dumps(structure) + '\n')
    with complete_or_absent(Path(folder) / 'shrunk.pth') as temporary:
        torch.save({'state_dict': state, 'meta': plain(meta or {})}, temporary)


def save_onnx(
    model: nn.Module,
    images: Tensor,
    path: str | Path,
    names: Sequence[str],
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
) -> float:
    """Save an ONNX model that was compared with the model by ONNX Runtime; returns the difference.

    Batch norms that follow a convolution are folded into it; blocks of zeros stay blocks of zeros.

    Args:
        model: A model in eval mode; takes images and gives a tuple of tensors.
        images: Example input `(N, C, H, W)`; the file takes images of this size.
        path: The file to write.
        names: Names of the outputs. The input is called `images`.
        dynamic_batch: Let the file take any number of images at once.
        tolerance: Largest difference allowed, as a share of the largest value of an output.

    Returns:
        Largest difference over all outputs, as a share of the output's largest absolute value.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is missing.
        ArithmeticError: If the file computes something else; it is not kept.
    """
    _require('onnx', 'onnxscript', 'onnxruntime')
    import onnxruntime

    two = torch.cat([images, -images])
    with complete_or_absent(path) as temporary:
        with torch.no_grad(), _exporter_quiet():
            torch.onnx.export(
                model,
                (two if dynamic_batch else images,),
                str(temporary),
                input_names=['images'],
                output_names=list(names),
                dynamic_shapes=({0: torch.export.Dim('batch')},) if dynamic_batch else None,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(temporary, providers=['CPUExecutionProvider'])
        differences = []
        for batch in [images, torch.cat([two, images])] if dynamic_batch else [images]:
            made = session.run(list(names), {'images': batch.numpy()})
            with torch.no_grad():
                outputs = model(batch)
            differences.append(largest_difference(outputs, map(torch.from_numpy, made)))
        difference = _largest(differences)
        hint = ' Some models have the number of images in their graph.' if dynamic_batch else ''
        expect_at_most(tolerance, difference, path, hint)
    return difference


def save_exported_program(
    model: nn.Module, images: Tensor, path: str | Path, tolerance: float = 1e-4
) -> float:
    """Save the graph of `torch.export` (a `.pt2` file) after it was read back and compared.

    Args:
        model: A model in eval mode; takes images and gives a tuple of tensors.
        images: Example input `(N, C, H, W)`; the file takes inputs of this shape.
        path: The file to write.
        tolerance: As for :func:`save_onnx`.

    Returns:
        As :func:`save_onnx`.

    Raises:
        ArithmeticError: If the file computes something else; it is not kept.
    """
    with complete_or_absent(path) as temporary, torch.no_grad():
        with _exporter_quiet():
            torch.export.save(torch.export.export(model, (images,), strict=False), temporary)
            loaded = torch.export.load(temporary).module()
        difference = largest_difference(model(images), loaded(images))
        expect_at_most(tolerance, difference, path)
    return difference


@contextmanager
def _exporter_quiet() -> Iterator[None]:
    """Hide what the exporters warn of: their own internals, and what they trace elsewhere."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def largest_difference(outputs: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    def share(one: Tensor, other: Tensor) -> float:
        scale = float(one.abs().max()) or 1.0
        return float((one - other).abs().max()) / scale

    return _largest([share(one, other) for one, other in zip(outputs, others, strict=True)])


def _largest(values: Sequence[float]) -> float:
    """NaN if one of them is, which `max` may pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def expect_at_most(tolerance: float, difference: float, path: str | Path, hint: str = '') -> None:
    if not difference <= tolerance:  # NaN is no agreement either
        raise ArithmeticError(
            f'{Path(path).name}: its outputs differ from the model by {difference:.1e} of their '
            f'largest value, more than {tolerance:.0e}. The file was not kept.{hint}'
        )


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{" and ".join(missing)} not installed. Install it: pip install {" ".join(missing)}'
        )


def stock_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names that the model gave to its tensors while it ran."""
    state, masks = model.state_dict(), masks_of(model)
    if masks is None:
        return state
    stock = {value.data_ptr() for key, value in state.items() if key in masks.stock_keys}
    return {
        key: value
        for key, value in state.items()
        if key in masks.stock_keys or value.data_ptr() not in stock
    }


@contextmanager
def complete_or_absent(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, renamed to it when the block ends without an error."""
    path = Path(path)
    # By chance: containers that share a folder share the numbers of processes too. Short, since
    # torch.save writes the name before every tensor.
    temporary = path.with_name(f'.{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """The same value out of Python's own dicts, lists, numbers and strings.

    Example:
        >>> plain({'palette': torch.tensor([1, 2]), 'classes': ('a', 'b')})
        {'palette': [1, 2], 'classes': ['a', 'b']}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, 'tolist'):  # tensors, arrays and their scalars
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
