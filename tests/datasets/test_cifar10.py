"""CIFAR-10 reads the same from each of its forms."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

from mmsmart.datasets import PackedCIFAR10
from mmsmart.registry import DATASETS

SIZES = dict(train=10, test=4)


def drawn(split):
    """A few images and labels, the same for every form."""
    generator = np.random.default_rng(len(split))
    size = SIZES[split]
    # Smooth, so that JPEG keeps them; of three different colours, so that their order shows.
    ramp = np.linspace(0, 120, 32)[:, None, None] + generator.integers(0, 60, (size, 1, 1, 3))
    images = np.broadcast_to(ramp + np.array([0, 30, 60]), (size, 32, 32, 3)).astype(np.uint8)
    return images, generator.integers(0, 10, size)


def as_arrays(root):
    parts = {split: drawn(split) for split in SIZES}
    np.savez(
        root / 'cifar10.npz',
        **{f'{split}_images': images for split, (images, _) in parts.items()},
        **{f'{split}_labels': labels for split, (_, labels) in parts.items()},
    )


def as_jpegs(root):
    arrays = {}
    for split in SIZES:
        images, labels = drawn(split)
        files = [
            cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].ravel()
            for image in images
        ]
        arrays[f'{split}_jpeg'] = np.concatenate(files)
        arrays[f'{split}_offsets'] = np.cumsum([0, *map(len, files)])
        arrays[f'{split}_labels'] = labels
    np.savez(root / 'cifar10_jpegpack.npz', **arrays)


def as_batches(root):
    folder = root / 'cifar-10-batches-py'
    folder.mkdir()
    images, labels = drawn('train')
    parts = {f'data_batch_{i + 1}': slice(2 * i, 2 * i + 2) for i in range(5)}
    batches = {name: (images[part], labels[part]) for name, part in parts.items()}
    batches['test_batch'] = drawn('test')
    for name, (images, labels) in batches.items():
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {'data': rows, 'labels': [int(label) for label in labels]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {'label_names': list(PackedCIFAR10.METAINFO['classes'])}
    (folder / 'batches.meta').write_bytes(pickle.dumps(names))


@pytest.mark.parametrize('split', SIZES)
@pytest.mark.parametrize(
    ('write', 'tolerance'),
    [
        pytest.param(as_arrays, 0, id='arrays'),
        pytest.param(as_jpegs, 6, id='jpegs'),
        pytest.param(as_batches, 0, id='batches'),
    ],
)
def test_every_form_gives_the_same_images_and_labels(
    tmp_path, monkeypatch, write, tolerance, split
):
    # These are not the files that mmpretrain knows the checksums of.
    monkeypatch.setattr('mmpretrain.datasets.CIFAR10._check_integrity', lambda self: True)
    write(tmp_path)
    dataset = PackedCIFAR10(str(tmp_path), split)
    images, labels = drawn(split)
    assert len(dataset) == SIZES[split]
    for index, (image, label) in enumerate(zip(images, labels)):
        sample = dataset[index]
        assert sample['gt_label'] == label
        assert sample['img'].shape == (32, 32, 3) and sample['img'].dtype == np.uint8
        assert np.abs(sample['img'].astype(int) - image.astype(int)).max() <= tolerance


def test_validation_split_is_the_end_of_the_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr('mmsmart.datasets.cifar10._HELD_OUT', 4)
    as_arrays(tmp_path)
    held_out, labels = PackedCIFAR10(str(tmp_path), 'val'), drawn('train')[1]
    assert [held_out[i]['gt_label'] for i in range(len(held_out))] == labels[-4:].tolist()


def test_arrays_come_before_the_other_forms(tmp_path):
    as_arrays(tmp_path)
    (tmp_path / 'cifar10_jpegpack.npz').write_bytes(b'not read')
    assert len(PackedCIFAR10(str(tmp_path), 'test')) == 4


def test_archive_with_pickles_is_not_read(tmp_path):
    np.savez(tmp_path / 'cifar10.npz', test_images=np.array([object()]), test_labels=[0])
    with pytest.raises(ValueError, match='allow_pickle'):
        PackedCIFAR10(str(tmp_path), 'test')


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    as_arrays(tmp_path)
    assert len(PackedCIFAR10('~', 'train')) == 10


def test_config_builds_it_by_its_name_with_a_part_of_the_images(tmp_path):
    as_arrays(tmp_path)
    config = dict(type='mmsmart.PackedCIFAR10', data_root=str(tmp_path), indices=3)
    assert len(DATASETS.build(config)) == 3


def test_missing_data_is_an_error_that_names_the_forms_and_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        PackedCIFAR10(str(tmp_path / 'nowhere'))
    for word in ('cifar10.npz', 'cifar10_jpegpack.npz', 'cifar-10-batches-py', 'nowhere'):
        assert word in str(error.value)


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"split: got 'valid', allowed are 'train', 'val' and"):
        PackedCIFAR10(str(tmp_path), 'valid')
