"""Data sets that need no download, or that read a packed archive."""

from mmsmart.datasets.cifar10 import PackedCIFAR10
from mmsmart.datasets.digits import Digits

__all__ = ['Digits', 'PackedCIFAR10']
