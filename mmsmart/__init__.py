"""mmsmart prunes blocks of weights out of OpenMMLab models with the SMART method.

This package imports torch alone; what needs MMEngine lives in :mod:`mmsmart.engine` and is imported
by MMEngine's registries when a config names it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmsmart.version import __version__

if TYPE_CHECKING:
    from mmsmart.install import install_masks, masks_of, remove_masks
    from mmsmart.masking import BlockMasks

__all__ = ['BlockMasks', '__version__', 'install_masks', 'masks_of', 'remove_masks']


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: `python -m mmsmart` must run where torch is missing.
    if name in __all__:
        room = 'masking' if name == 'BlockMasks' else 'install'
        return getattr(importlib.import_module(f'mmsmart.{room}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
