"""CIFAR-10 out of one NumPy archive, or out of the usual folder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.dataset import BaseDataset

from mmsmart.registry import DATASETS

_HELD_OUT = 5000
_CLASSES = (
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'
)  # fmt: skip


@DATASETS.register_module()
class PackedCIFAR10(BaseDataset):
    """CIFAR-10 from whichever form of it lies in `data_root`.

    - `cifar10.npz`: arrays `{split}_images` `(n, 32, 32, 3)` uint8 RGB and `{split}_labels`.
    - `cifar10_jpegpack.npz`: JPEG files end to end, `{split}_jpeg`, with `{split}_offsets`
      `(n + 1,)` and `{split}_labels`.
    - `cifar-10-batches-py/`: the usual folder, read by mmpretrain's `CIFAR10`.

    Nothing is downloaded, and archives are read without pickles.

    Args:
        data_root: Folder that holds one of the three.
        split: 'train', 'test', or 'val', the last 5,000 images of 'train': to choose settings on,
            so that they are not chosen on the test split. Train with `indices=45000` or fewer then.
        kwargs: Arguments of MMEngine's `BaseDataset`, such as `pipeline` and `indices`.

    Raises:
        ValueError: For another split.
        FileNotFoundError: If `data_root` holds none of the three.
    """

    METAINFO = {'classes': _CLASSES}

    def __init__(self, data_root: str, split: str = 'train', **kwargs: Any) -> None:
        if split not in ('train', 'val', 'test'):
            raise ValueError(f"split: got {split!r}, allowed are 'train', 'val' and 'test'.")
        self.split = split
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        if self.split == 'val':
            return self._read('train')[-_HELD_OUT:]
        return self._read(self.split)

    def _read(self, split: str) -> list[dict[str, Any]]:
        root = Path(self.data_root).expanduser()
        if (root / 'cifar10.npz').is_file():
            with np.load(root / 'cifar10.npz', allow_pickle=False) as archive:
                images, labels = archive[f'{split}_images'], archive[f'{split}_labels']
        elif (root / 'cifar10_jpegpack.npz').is_file():
            with np.load(root / 'cifar10_jpegpack.npz', allow_pickle=False) as archive:
                jpeg, offsets = archive[f'{split}_jpeg'], archive[f'{split}_offsets']
                labels = archive[f'{split}_labels']
            images = [
                mmcv.imfrombytes(jpeg[start:end].tobytes(), channel_order='rgb')
                for start, end in pairwise(offsets)
            ]
        elif (root / 'cifar-10-batches-py').is_dir():
            from mmpretrain.datasets import CIFAR10

            return CIFAR10(str(root), split=split, download=False, lazy_init=True).load_data_list()
        else:
            raise FileNotFoundError(
                f'data_root: {root} holds none of cifar10.npz, cifar10_jpegpack.npz and '
                'cifar-10-batches-py/. Put CIFAR-10 there, or set data_root to where it is.'
            )
        return [dict(img=image, gt_label=int(label)) for image, label in zip(images, labels)]
