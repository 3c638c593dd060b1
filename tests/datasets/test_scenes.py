"""Scenes of digits on photographs: the same everywhere, nothing shared, scored as they should."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmsmart.datasets import Digits, DigitScenes, SegmentedDigitScenes
from mmsmart.registry import DATASETS

COUNT = 24

# Of pycocotools, with NumPy 2.
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')


@pytest.fixture(scope='module')
def splits():
    return {split: DigitScenes(split, COUNT) for split in ('train', 'test')}


@pytest.fixture(scope='module')
def items(splits):
    return [dataset[index] for dataset in splits.values() for index in range(COUNT)]


def mask_of(instance):
    """COCO's run lengths, decoded by COCO's own tools."""
    coco = pytest.importorskip('pycocotools.mask')
    height, width = instance['mask']['size']
    return coco.decode(coco.frPyObjects(instance['mask'], height, width)).astype(bool)


def test_scenes_have_the_size_and_number_that_was_asked():
    dataset = DigitScenes('test', 3, size=64)
    assert len(dataset) == 3
    assert dataset[0]['img'].shape == (64, 64, 3) and dataset[0]['img'].dtype == np.uint8
    assert (dataset[0]['height'], dataset[0]['width']) == (64, 64)


def test_places_and_labels_are_the_same_on_every_machine(splits):
    """The pictures themselves are as exact as the machine's JPEG decoder."""
    digest = hashlib.sha256()
    for dataset in splits.values():
        for index in range(COUNT):
            for instance in dataset[index]['instances']:
                digest.update(repr((instance['bbox'], instance['bbox_label'])).encode())
    assert digest.hexdigest()[:16] == '1485499533ba1f90'


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one(splits):
    for split, dataset in splits.items():
        few = DigitScenes(split, 5)
        for index in range(5):
            one, other = few[index], dataset[index]
            assert np.array_equal(one.pop('img'), other.pop('img'))
            assert {**one, 'sample_idx': 0} == {**other, 'sample_idx': 0}


def test_a_scene_holds_one_to_six_digits_of_every_class(items):
    counts = [len(item['instances']) for item in items]
    assert min(counts) >= 1 and max(counts) <= 6 and np.mean(counts) > 2
    labels = [instance['bbox_label'] for item in items for instance in item['instances']]
    assert set(labels) == set(range(10))


def test_boxes_are_the_smallest_around_the_masks(items):
    for item in items:
        for instance in item['instances']:
            mask = mask_of(instance)
            x1, y1, x2, y2 = (int(edge) for edge in instance['bbox'])
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum() > 0
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
            assert 6 <= y2 - y1 <= 32


def test_digits_have_the_size_that_was_asked():
    boxes = [
        instance['bbox']
        for item in DigitScenes('train', 20, pixels=(40, 48))
        for instance in item['instances']
    ]
    heights = [y2 - y1 for _, y1, _, y2 in boxes]
    assert min(heights) >= 30 and max(heights) <= 48


def test_digits_stand_apart(items):
    for item in items:
        covered = sum(mask_of(instance).astype(int) for instance in item['instances'])
        assert covered.max() == 1


def test_digits_can_be_seen(items):
    """The mean of a digit differs from what is around it, lighter or darker."""
    differences = []
    for item in items:
        grey = item['img'].mean(axis=2)
        for instance in item['instances']:
            mask = mask_of(instance)
            x1, y1, x2, y2 = (int(edge) for edge in instance['bbox'])
            near = np.zeros_like(mask)
            near[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = True
            differences.append(grey[mask].mean() - grey[near & ~mask].mean())
    differences = np.array(differences)
    assert np.mean(np.abs(differences) > 20) > 0.8
    assert np.mean(differences > 20) > 0.2 and np.mean(differences < -20) > 0.2


def test_label_map_agrees_with_the_masks(splits):
    for split, dataset in splits.items():
        segmented = SegmentedDigitScenes(split, COUNT)
        assert segmented.metainfo['classes'] == ('background', *dataset.metainfo['classes'])
        for index in range(COUNT):
            one, other = dataset[index], segmented[index]
            expected = np.zeros(one['img'].shape[:2], int)
            for instance in one['instances']:
                expected[mask_of(instance)] = instance['bbox_label'] + 1
            assert np.array_equal(other['gt_seg_map'], expected)
            assert np.array_equal(other['img'], one['img'])


def test_splits_share_neither_a_digit_nor_a_part_of_a_photograph(monkeypatch):
    """Every pixel of digits and photographs is marked by the split that may see it."""
    seen = {split: {item['img'].tobytes() for item in Digits(split)} for split in ('train', 'test')}
    # Scikit-learn's digits are all different images.
    assert not seen['train'] & seen['test']

    columns = np.broadcast_to(np.arange(640) * 255 // 639, (427, 640))
    photograph = np.repeat(columns[..., None], 3, axis=2).astype(np.uint8)
    given = type('Bunch', (), dict(images=[photograph]))
    monkeypatch.setattr('sklearn.datasets.load_sample_images', lambda: given)
    # Scenes as bright as the photograph, with invisible digits: what is left are its columns.
    monkeypatch.setattr('mmsmart.datasets.scenes._ink_colour', lambda random, under: under)
    monkeypatch.setattr('mmsmart.datasets.scenes._PERCENT', (100, 100))
    values = {
        split: {int(v) for item in DigitScenes(split, 60) for v in np.unique(item['img'])}
        for split in ('train', 'test')
    }
    assert max(values['train']) < min(values['test'])
    assert min(values['train']) < 10 and max(values['test']) > 245


@pytest.fixture
def mmdet_scope():
    pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    init_default_scope('mmdet')


def test_coco_metric_gives_perfect_predictions_everything(mmdet_scope):
    from mmdet.evaluation import CocoMetric

    dataset = DigitScenes(
        'test',
        8,
        test_mode=True,
        pipeline=[
            dict(type='mmdet.LoadImageFromNDArray'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                type='mmdet.PackDetInputs', meta_keys=('img_id', 'ori_shape', 'instances')
            ),
        ],
    )  # fmt: skip
    metric = CocoMetric(metric=['bbox', 'segm'])
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        truth = sample.gt_instances
        assert truth.masks.masks.shape == (len(truth), 128, 128)
        sample.pred_instances = InstanceData(
            bboxes=truth.bboxes.tensor,
            labels=truth.labels,
            scores=torch.ones(len(truth)),
            masks=torch.from_numpy(truth.masks.masks.astype(bool)),
        )
        metric.process({}, [sample.to_dict()])
    scores = metric.evaluate(len(dataset))
    assert scores['coco/bbox_mAP'] == scores['coco/segm_mAP'] == 1


def test_iou_metric_gives_perfect_predictions_everything():
    mmseg = pytest.importorskip('mmseg.evaluation')
    init_default_scope('mmseg')
    dataset = SegmentedDigitScenes(
        'test',
        COUNT,
        pipeline=[dict(type='mmseg.LoadImageFromNDArray'), dict(type='mmseg.PackSegInputs')],
    )
    metric = mmseg.IoUMetric()
    metric.dataset_meta = dataset.metainfo
    samples = pseudo_collate([dataset[index] for index in range(COUNT)])['data_samples']
    for sample in samples:
        assert sample.gt_sem_seg.data.shape == (1, 128, 128)
        sample.pred_sem_seg = PixelData(data=sample.gt_sem_seg.data.clone())
    metric.process({}, [sample.to_dict() for sample in samples])
    assert metric.evaluate(COUNT)['mIoU'] == 100


@pytest.mark.parametrize('name', ['DigitScenes', 'SegmentedDigitScenes'])
def test_config_builds_it_by_its_name(name):
    config = dict(type=f'mmsmart.{name}', split='test', scenes=2, indices=1)
    assert len(DATASETS.build(config)) == 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='val'), r"split: got 'val', allowed are 'train' and 'test'"),
        (dict(scenes=0), r'scenes: expected an integer from 1 to 10,000, got 0'),
        (dict(scenes=10_001), r'scenes: .* got 10001'),
        (dict(scenes=4.0), r'scenes: .* got 4\.0'),
        (dict(size=True), r'size: .* got True'),
        (dict(size=63), r'size: expected an integer from 64 to 160, got 63'),
        (dict(size=161), r'size: .* got 161'),
        (dict(digits=(0, 6)), r'digits\[0\]: expected an integer from 1 to 16, got 0'),
        (dict(pixels=(7, 32)), r'pixels\[0\]: expected an integer from 8 to 48, got 7'),
        (dict(pixels=(20, 19)), r'pixels\[1\]: expected an integer from 20 to 48, got 19'),
        (dict(pixels=20), r'pixels: expected two integers, least and greatest, got 20'),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**arguments)
