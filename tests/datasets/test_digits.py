"""The digits of scikit-learn as a data set that needs no download."""

from __future__ import annotations

import numpy as np
import pytest

from mmsmart.datasets import Digits
from mmsmart.registry import DATASETS


@pytest.fixture(scope='module')
def splits():
    return {split: Digits(split) for split in ('train', 'test')}


def test_splits_have_the_sizes_that_are_promised(splits):
    assert len(splits['train']) == 1347
    assert len(splits['test']) == 450


def test_images_are_rgb_and_use_the_whole_range(splits):
    sample = splits['train'][0]
    assert sample['img'].shape == (8, 8, 3) and sample['img'].dtype == np.uint8
    images = np.stack([splits['test'][index]['img'] for index in range(450)])
    assert (images.min(), images.max()) == (0, 255)
    assert np.array_equal(images[..., 0], images[..., 2])


def test_every_class_is_about_as_frequent_in_both_splits(splits):
    assert splits['train'].metainfo['classes'] == tuple('0123456789')
    for dataset in splits.values():
        labels = [dataset.get_data_info(index)['gt_label'] for index in range(len(dataset))]
        counts = np.bincount(labels, minlength=10) / len(labels)
        assert counts.shape == (10,) and np.all(np.abs(counts - 0.1) < 0.02)


def test_every_image_is_in_exactly_one_split(splits):
    from sklearn.datasets import load_digits

    stored = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    found = [
        dataset[index]['img'][..., 0]
        for dataset in splits.values()
        for index in range(len(dataset))
    ]
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in stored)


def test_images_are_those_of_scikit_learn_in_its_order(splits):
    from sklearn.datasets import load_digits

    digits = load_digits()
    third = splits['train'][3]  # 0 is a test image, so are 4 and 8
    assert third['gt_label'] == digits.target[5]
    assert np.array_equal(third['img'][..., 0], np.round(digits.images[5] * 255 / 16))


def test_data_set_is_the_same_every_time(splits):
    again = Digits('train')
    for index in (0, 1, 700, 1346):
        one, two = splits['train'][index], again[index]
        assert one['gt_label'] == two['gt_label']
        assert np.array_equal(one['img'], two['img'])


def test_a_part_may_be_taken():
    assert len(Digits('train', indices=32)) == 32


def test_config_builds_it_by_its_name():
    assert isinstance(DATASETS.build(dict(type='mmsmart.Digits', split='test')), Digits)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split: got 'val', allowed are 'train' and 'test'"):
        Digits('val')
