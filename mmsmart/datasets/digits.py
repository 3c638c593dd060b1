"""Handwritten digits that ship with scikit-learn: 1797 real images of 8x8 pixels, ten classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from mmsmart.registry import DATASETS

# Every group of ten images holds about one of each class, in the order of collection. Taking every
# n-th for the test keeps writers mixed and the split the same on every machine.
_TEST_EVERY = 4


@DATASETS.register_module()
class Digits(BaseDataset):
    """Digits as RGB images in memory, for pipelines that begin with a loaded `img`.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository
    (test part), as shipped in scikit-learn.

    Args:
        split: 'train' (1347 images) or 'test' (450 images).
        kwargs: Arguments of MMEngine's `BaseDataset`, such as `pipeline` and `indices`.

    Raises:
        ValueError: For another split.
    """

    METAINFO = {'classes': tuple(str(digit) for digit in range(10))}

    def __init__(self, split: str = 'train', **kwargs: Any) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"split: got {split!r}, allowed are 'train' and 'test'.")
        self.split = split
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype(np.uint8)
        in_test = np.arange(len(images)) % _TEST_EVERY == 0
        chosen = np.flatnonzero(in_test if self.split == 'test' else ~in_test)
        return [
            dict(
                img=np.repeat(images[i, :, :, None], 3, axis=2),
                gt_label=int(digits.target[i]),
            )
            for i in chosen
        ]
