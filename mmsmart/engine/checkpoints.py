"""Read what MMEngine saved, without running anything that is in it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of any kind, read with `weights_only=True`; tensors stay on the disk until used.

    Raises:
        ValueError: If it can't be read, or holds something else.
    """
    path = Path(path)
    mapped = zipfile.is_zipfile(path)  # older ones are pickles as a whole
    try:
        with torch.serialization.safe_globals(_found_in_mmengine_checkpoints()):
            checkpoint = torch.load(path, 'cpu', weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        message = (
            f'{path}: not a checkpoint, or one that holds more than tensors, numbers and text (it '
            'is read with weights_only=True).'
        )
        raise ValueError(message) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path}: it holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint


def _found_in_mmengine_checkpoints() -> list[Any]:
    """Types of the log that MMEngine saves beside the weights; none of them runs foreign code."""
    core = np._core if hasattr(np, '_core') else np.core
    arrays = [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype]
    kinds = [type(np.dtype(kind)) for kind in ('float32', 'float64', 'int64', 'uint32', 'bool')]
    return [*arrays, *kinds, HistoryBuffer, getattr]
