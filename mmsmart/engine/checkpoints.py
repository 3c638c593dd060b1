"""Read what MMEngine saved, without running anything that is in it."""

from __future__ import annotations

import pickle
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# Older ones can't be told which of MMEngine's types are harmless.
READS_SAFELY = hasattr(torch.serialization, 'safe_globals')


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of any kind, read with `weights_only=True`; tensors stay on the disk until used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be read, or holds something else.
    """
    path = Path(path)
    mapped = zipfile.is_zipfile(path)  # older ones are pickles as a whole
    try:
        with mmengine_types():
            checkpoint = torch.load(path, 'cpu', weights_only=True, mmap=mapped)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        hint = '' if READS_SAFELY else ' That of a running training needs torch 2.5 or later.'
        raise ValueError(
            f'{path}: not a checkpoint, or one that holds more than tensors, numbers and text '
            f'({_first_line(error)}). It is read with weights_only=True, because more could run '
            f'foreign code.{hint} If you trust it, save its weights alone: '
            f"torch.save({{'state_dict': torch.load({str(path)!r}, weights_only=False)"
            "['state_dict']}, 'weights.pth')."
        ) from error
    except Exception as error:  # torch has no error of its own for a file that it can't read
        raise ValueError(
            f'{path}: cut short, damaged or no checkpoint ({_first_line(error)}).'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path}: it holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint


def mmengine_types() -> AbstractContextManager[Any]:
    """Inside, `weights_only=True` knows the types of the log that MMEngine saves with the weights.

    None of them runs foreign code. Does nothing for a torch older than 2.5.
    """
    if not READS_SAFELY:
        return nullcontext()
    core = np._core if hasattr(np, '_core') else np.core
    arrays = [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype]
    kinds = [type(np.dtype(kind)) for kind in ('float32', 'float64', 'int64', 'uint32', 'bool')]
    return torch.serialization.safe_globals([*arrays, *kinds, HistoryBuffer, getattr])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
