"""mmsmart prunes blocks of weights out of OpenMMLab models with the SMART method.

This package imports torch alone; what needs MMEngine lives in :mod:`mmsmart.engine` and is imported
by MMEngine's registries when a config names it.
"""

from mmsmart.masking import BlockMasks, install_masks, masks_of, remove_masks
from mmsmart.version import __version__

__all__ = ['BlockMasks', '__version__', 'install_masks', 'masks_of', 'remove_masks']
