"""Write what a pruned model is handed on as; a file is complete or it is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.masking import masks_of


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
    state = {key: value.detach().cpu() for key, value in _stock_state(model).items()}
    with complete_or_absent(path) as temporary:
        torch.save({'state_dict': state, 'meta': plain(meta or {})}, temporary)


def _stock_state(model: nn.Module) -> dict[str, Tensor]:
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
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}.tmp{path.suffix}')
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
