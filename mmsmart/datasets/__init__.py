"""Data sets that need no download, or that read a packed archive."""

from mmsmart.datasets.cifar10 import PackedCIFAR10
from mmsmart.datasets.digits import Digits
from mmsmart.datasets.scenes import DigitScenes, SegmentedDigitScenes

__all__ = ['DigitScenes', 'Digits', 'PackedCIFAR10', 'SegmentedDigitScenes']
