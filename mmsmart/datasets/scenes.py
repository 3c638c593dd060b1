"""Scenes for detectors and segmentors: handwritten digits on photographs, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from mmsmart.datasets.digits import Digits
from mmsmart.registry import DATASETS

# The photographs, 640x427, are halved so that a crop shows more. Columns right of this one are for
# the test, so `size` is limited.
_TEST_COLUMNS_FROM = 160
_SIZES = (64, 160)
_DIGIT_SIZES = (8, 48)
_MOST_SCENES = 10_000  # 0.5 GB at 128 pixels
_MOST_DIGITS = 16
_TRIES = 10  # to find room for a digit
_INK = 255  # the darkest value of a stored digit
_PERCENT = (20, 70)  # of the photograph's contrast
_CONTRAST = 90  # least difference between ink and what lies under it, of 255

_NAMES = tuple(str(digit) for digit in range(10))
_COLOURS = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (255, 221, 51), (110, 130, 0), (23, 190, 207),
]  # fmt: skip

_Pasted = tuple[int, np.ndarray]  # label, and mask of the whole scene


@DATASETS.register_module()
class DigitScenes(BaseDataset):
    """Scenes with a box and a mask for each digit, for pipelines that begin with a loaded `img`.

    Some of scikit-learn's digits, lighter or darker than what is under them, stand apart from each
    other on a crop of one of scikit-learn's two photographs. No digit and no part of a photograph
    is in both splits. A scene depends on its number alone: a smaller data set is the beginning of a
    larger one. Places and labels are the same on every machine.

    Each item has `img` `(size, size, 3)` uint8 BGR, `img_id`, `height`, `width` and `instances`
    with `bbox` (x1, y1, x2, y2) in pixels, `bbox_label` 0 to 9, `mask` as uncompressed COCO RLE and
    `ignore_flag`. mmdet's `CocoMetric` without `ann_file` takes its ground truth from there, if
    `instances` is among the `meta_keys` of `PackDetInputs`.

    Args:
        split: 'train' or 'test'.
        scenes: How many, 1 to 10,000.
        size: Height and width of a scene in pixels, 64 to 160.
        digits: Least and greatest number of digits in a scene, 1 to 16. Those that there is no room
            for are left out.
        pixels: Least and greatest size of a digit, 8 (as it is stored) to 48. Its ink is a little
            smaller.
        kwargs: Arguments of MMEngine's `BaseDataset`, such as `pipeline` and `indices`.

    Raises:
        ValueError: For another split, or a number out of its range.
    """

    METAINFO = {'classes': _NAMES, 'palette': _COLOURS}

    def __init__(
        self,
        split: str = 'train',
        scenes: int = 256,
        size: int = 128,
        digits: Sequence[int] = (2, 6),
        pixels: Sequence[int] = (12, 32),
        **kwargs: Any,
    ) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"split: got {split!r}, allowed are 'train' and 'test'.")
        _check_integer('scenes', scenes, 1, _MOST_SCENES)
        _check_integer('size', size, *_SIZES)
        _check_range('digits', digits, 1, _MOST_DIGITS)
        _check_range('pixels', pixels, *_DIGIT_SIZES)
        self.split, self.scenes, self.size = split, scenes, size
        self.digits, self.pixels = digits, pixels
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        from sklearn.datasets import load_sample_images

        digits = list(Digits(self.split))  # whose splits share no digit
        test = self.split == 'test'
        side = slice(_TEST_COLUMNS_FROM, None) if test else slice(_TEST_COLUMNS_FROM)
        photographs = [_halved(image)[:, side, ::-1] for image in load_sample_images().images]
        return [
            self._item(number, *self._scene(number, digits, photographs))
            for number in range(self.scenes)
        ]

    def _scene(
        self, number: int, digits: list[dict[str, Any]], photographs: list[np.ndarray]
    ) -> tuple[np.ndarray, list[_Pasted]]:
        """The image of one scene, and label and mask of each digit on it.

        Integers only, from the one generator whose stream NumPy promises never to change.
        """
        random = np.random.RandomState([self.split == 'test', number])
        image = _background(random, photographs[random.randint(len(photographs))], self.size)
        taken = np.zeros((self.size, self.size), bool)
        pasted = []
        for _ in range(random.randint(self.digits[0], self.digits[1] + 1)):
            digit = digits[random.randint(len(digits))]
            pixels = random.randint(self.pixels[0], self.pixels[1] + 1)
            corners = random.randint(0, self.size - pixels + 1, (_TRIES, 2))
            places = [np.s_[y : y + pixels, x : x + pixels] for y, x in corners]
            place = next((place for place in places if not taken[place].any()), None)
            if place is None:
                continue
            taken[place] = True
            ink = _enlarged(digit['img'][..., 0].astype(np.int64), pixels)
            under = image[place]
            under += (_ink_colour(random, under) - under) * ink[..., None] // _INK
            mask = np.zeros((self.size, self.size), bool)
            mask[place] = 2 * ink >= _INK
            pasted.append((digit['gt_label'], mask))
        return image.astype(np.uint8), pasted

    def _item(self, number: int, image: np.ndarray, digits: list[_Pasted]) -> dict[str, Any]:
        instances = [
            dict(bbox=_box(mask), bbox_label=label, mask=_run_lengths(mask), ignore_flag=0)
            for label, mask in digits
        ]
        return dict(
            img=image, img_id=number, height=self.size, width=self.size, instances=instances
        )


@DATASETS.register_module()
class SegmentedDigitScenes(DigitScenes):
    """The same scenes with a label for each pixel: 0 for the background, 1 to 10 for digits 0 to 9.

    Each item has `img` and `gt_seg_map` `(size, size)` uint8, so the pipeline needs no
    `LoadAnnotations`.
    """

    METAINFO = {'classes': ('background', *_NAMES), 'palette': [(0, 0, 0), *_COLOURS]}

    def _item(self, number: int, image: np.ndarray, digits: list[_Pasted]) -> dict[str, Any]:
        labels = np.zeros(image.shape[:2], np.uint8)
        for label, mask in digits:
            labels[mask] = label + 1
        return dict(
            img=image,
            img_id=number,
            gt_seg_map=labels,
            seg_fields=['gt_seg_map'],
            reduce_zero_label=False,
        )


def _halved(image: np.ndarray) -> np.ndarray:
    """Each pixel the mean of four."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    even = image[: 2 * height, : 2 * width].astype(np.int64)
    return even.reshape(height, 2, width, 2, 3).sum(axis=(1, 3)) // 4


def _background(random: np.random.RandomState, photograph: np.ndarray, size: int) -> np.ndarray:
    """A crop, mirrored or not, of reduced contrast and other brightness."""
    top = random.randint(photograph.shape[0] - size + 1)
    left = random.randint(photograph.shape[1] - size + 1)
    crop = photograph[top : top + size, left : left + size]
    if random.randint(2):
        crop = crop[:, ::-1]
    percent = random.randint(_PERCENT[0], _PERCENT[1] + 1)
    brightest_black = 255 * (100 - percent) // 100
    return crop * percent // 100 + random.randint(brightest_black + 1)


def _ink_colour(random: np.random.RandomState, under: np.ndarray) -> np.ndarray:
    """A colour that is readable on what is under it."""
    # Drawn first: a pixel that another JPEG decoder gives otherwise must not move later digits.
    rather_lighter, share, tint = random.randint(2), random.randint(256), random.randint(-30, 31, 3)
    mean = int(under.sum()) // under.size
    room_below, room_above = mean - _CONTRAST, 255 - _CONTRAST - mean
    if room_above >= 0 and (rather_lighter or room_below < 0):
        brightness = 255 - room_above * share // 255
    else:
        brightness = room_below * share // 255
    return np.clip(brightness + tint, 0, 255)


def _enlarged(digit: np.ndarray, pixels: int) -> np.ndarray:
    """The digit at another size by linear interpolation, in integers."""
    stored = len(digit)
    here, there = 2 * np.arange(pixels) + 1, 2 * np.arange(stored) + 1  # centres, in half pixels
    distance = np.abs(here[:, None] * stored - there * pixels)
    weight = np.maximum(2 * pixels - distance, 0)
    return weight @ digit @ weight.T // (2 * pixels) ** 2


def _box(mask: np.ndarray) -> list[float]:
    """The smallest box (x1, y1, x2, y2) around the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


def _run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: lengths of runs down the columns, the first of zeros."""
    flat = np.concatenate([[False], mask.ravel(order='F')])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], starts, [mask.size]]))
    return dict(size=list(mask.shape), counts=counts.tolist())


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'{name}: expected an integer from {low:,} to {high:,}, got {value!r}.')


def _check_range(name: str, value: Sequence[int], low: int, high: int) -> None:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f'{name}: expected two integers, least and greatest, got {value!r}.')
    _check_integer(f'{name}[0]', value[0], low, high)
    _check_integer(f'{name}[1]', value[1], value[0], high)
