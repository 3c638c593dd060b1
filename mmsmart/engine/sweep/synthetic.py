"""Batches of noise in the form that each package's models take, with labels to learn from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData, PixelData

_SEMI_SUPERVISED = ('SoftTeacher', 'SemiBaseDetector')
_TRACKERS = ('QDTrack', 'MaskTrackRCNN', 'Mask2FormerVideo')


def input_sizes(package: str, config: Config) -> list[int]:
    """Edge lengths to try, small ones first: some models take one size, or none below a certain."""
    sizes = [*find(config.model, 'img_size'), *find(config.model, 'pretrain_img_size')]
    if package == 'mmpretrain':
        sizes += find(config.get('train_dataloader', {}), 'scale')
    sizes = [max(size) if isinstance(size, (list, tuple)) else size for size in sizes]
    given = [size for size in sizes if isinstance(size, int) and size <= 640]
    if package == 'mmpretrain':
        return list(dict.fromkeys([64, 224, *given]))
    return [64, 128, 256, 512] if package == 'mmseg' else [128, 256, 512]


def synthetic_batch(package: str, config: Config, size: int) -> dict[str, Any]:
    """Two samples, collated but not yet preprocessed.

    Args:
        package: 'mmpretrain', 'mmdet' or 'mmseg'.
        config: The stock config; of its model are taken classes and kind, of its pipeline what
            annotations it loads.
        size: Edge length of the square images.
    """
    make = {'mmpretrain': _pretraining, 'mmdet': _detection, 'mmseg': _segmentation}[package]
    np.random.seed(0)
    for key, value in {'iter': 0, 'max_iters': 100, 'epoch': 0, 'max_epochs': 10}.items():
        MessageHub.get_current_instance().update_info(key, value)  # losses that warm up ask it
    return make(config, size)


def edge_length(batch: Any) -> int:
    """Edge length of the (first) images of a batch."""
    images = batch['inputs'] if isinstance(batch, dict) else batch
    while not isinstance(images, torch.Tensor):
        images = next(iter(images.values() if isinstance(images, dict) else images))
    return images.shape[-1]


def _pretraining(config: Config, size: int) -> dict[str, Any]:
    from mmpretrain.structures import DataSample

    if config.model.type != 'ImageClassifier':
        return default_collate([_through_pipeline(config) for _ in range(2)])
    classes = _classes(config, default=1000)
    several = 'MultiLabel' in str(config.model.get('head'))
    samples = []
    for image in _images(2, size, _channels(config)):
        label = np.random.randint(classes)
        samples.append(
            {
                'inputs': image,
                'data_samples': DataSample().set_gt_label([label] if several else label),
            }
        )
    return pseudo_collate(samples)


def _through_pipeline(config: Config) -> Any:
    """A sample as the config's own pipeline makes it: views and masks of self-supervision."""
    from mmcv.transforms import Compose
    from mmpretrain.registry import TRANSFORMS

    steps = [s for s in config.train_dataloader.dataset.pipeline if 'Load' not in str(s['type'])]
    image = np.random.randint(0, 255, (256, 256, 3), dtype=np.uint8)
    found = {'img': image, 'img_shape': (256, 256), 'ori_shape': (256, 256), 'gt_label': 0}
    with TRANSFORMS.switch_scope_and_registry('mmpretrain'):
        return Compose(steps)({**found, 'img_path': '', 'sample_idx': 0})


def _detection(config: Config, size: int) -> dict[str, Any]:
    from mmdet.testing import demo_mm_inputs, demo_track_inputs

    classes, kind = _classes(config, default=1), str(config.model.type)
    if kind in _TRACKERS:
        return demo_track_inputs(
            batch_size=1, num_frames=2, key_frames_inds=[0], image_shapes=[(3, size, size)],
            num_items=[4], num_classes=classes, with_mask=True,
        )  # fmt: skip
    pipeline = config.to_dict().get('train_pipeline', [])
    scales = [step['scale_factor'] for step in pipeline if step['type'] == 'SegRescale']
    stride = round(1 / min([1, *scales]))
    batch = demo_mm_inputs(
        batch_size=2, image_shapes=(3, size, size), num_items=[4, 4], num_classes=max(2, classes),
        sem_seg_output_strides=stride, with_mask=True,
        with_semantic='Panoptic' in str(pipeline) or "'with_seg': True" in str(pipeline),
    )  # fmt: skip
    for sample in batch['data_samples']:
        sample.gt_instances.labels %= classes
        corner = torch.rand(50, 2) * size / 2
        boxes = torch.cat([corner, corner + torch.rand(50, 2) * size / 2 + 1], 1)
        sample.proposals = InstanceData(bboxes=boxes, scores=torch.rand(50))
        sample.set_metainfo({'batch_input_shape': (size, size), 'pad_shape': (size, size)})
        sample.set_metainfo({'homography_matrix': np.eye(3, dtype=np.float32)})
    if kind in _SEMI_SUPERVISED:
        branches = ('sup', 'unsup_teacher', 'unsup_student')
        return {
            key: {branch: copy.deepcopy(value) for branch in branches}
            for key, value in batch.items()
        }
    return batch


def _segmentation(config: Config, size: int) -> dict[str, Any]:
    from mmseg.structures import SegDataSample

    classes, samples = _classes(config, default=19), []
    for image in _images(2, size):
        # Large patches, so that auxiliary losses on boundaries and small maps see every class once.
        patches = np.random.randint(0, classes, (size // 32, size // 32))
        labels = torch.from_numpy(np.kron(patches, np.ones((32, 32), dtype=np.int64)))
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels[None]))
        if 'Depth' in str(config.model.type):
            sample.gt_depth_map = PixelData(data=torch.rand(1, size, size) + 0.5)
        sample.gt_edge_map = PixelData(data=(torch.rand(1, size, size) < 0.1).long())
        sample.set_metainfo({'img_shape': (size, size), 'ori_shape': (size, size)})
        samples.append({'inputs': image, 'data_samples': sample})
    return pseudo_collate(samples)


def _images(number: int, size: int, channels: int = 3) -> Iterator[torch.Tensor]:
    for _ in range(number):
        yield torch.from_numpy(np.random.randint(0, 255, (channels, size, size), dtype=np.uint8))


def _channels(config: Config) -> int:
    return len(next(find(config.get('data_preprocessor', {}), 'mean'), [0.0] * 3))


def _classes(config: Config, default: int) -> int:
    found = [*find(config.model, 'num_classes'), *find(config.model, 'num_things_classes')]
    return min((n for n in found if isinstance(n, int) and n > 0), default=default)


def find(node: Any, key: str) -> Iterator[Any]:
    """All values under this key, anywhere in a tree of dicts and lists.

    Example:
        >>> list(find({'a': 1, 'b': [{'a': 2}]}, 'a'))
        [1, 2]
    """
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key)
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from find(item, key)
