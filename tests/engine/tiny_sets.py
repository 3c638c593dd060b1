"""Tiny synthetic data sets and the stock detectors and segmentors that the tests prune on them.

Images hold bright rectangles on noise, drawn from a fixed seed. Configs inherit from those that the
toolboxes ship, with fewer channels.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from engine.runs import merged

CLASSES = ('red', 'green', 'blue')
YOLOX = 'yolox/yolox_tiny_8xb8-300e_coco.py'
RETINANET = 'retinanet/retinanet_r18_fpn_1x_coco.py'
MASK_RCNN = 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
DEEPLAB = 'deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'
META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
SMART = dict(
    sparsity=0.5,
    block=(4, 4, 1, 1),
    stages=dict(pretrain=0.2, search=0.4, finetune=0.4),
    importance=dict(batches=1),
)


def upstream_config(scope: str, name: str) -> Path:
    """A config of a toolbox as it was installed; stock tools can't resolve `mmseg::`."""
    return Path(importlib.util.find_spec(scope).origin).parent / '.mim/configs' / name


def scene(generator: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """An image and its rectangles `(class, x, y, width, height)`."""
    height, width = (int(side) for side in generator.integers(64, 97, 2))
    image = generator.integers(0, 60, (height, width, 3)).astype(np.uint8)
    boxes = []
    for _ in range(3):
        kind = int(generator.integers(0, len(CLASSES)))
        w, h = (int(side) for side in generator.integers(12, 40, 2))
        x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
        image[y : y + h, x : x + w, kind] += 150
        boxes.append((kind, x, y, w, h))
    return image, boxes


def write_coco(root: Path) -> Path:
    """Images in `images/`, boxes and polygons in `train.json` (6 images) and `val.json` (2)."""
    generator = np.random.default_rng(0)
    (root / 'images').mkdir(parents=True)
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)]
    for part, count in (('train', 6), ('val', 2)):
        images, annotations = [], []
        for index in range(count):
            image, boxes = scene(generator)
            name = f'{part}{index}.png'
            cv2.imwrite(str(root / 'images' / name), image)
            height, width = image.shape[:2]
            images.append(dict(id=index, file_name=name, height=height, width=width))
            for kind, x, y, w, h in boxes:
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=index,
                        category_id=kind + 1,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[corners],
                    )
                )
        everything = dict(images=images, annotations=annotations, categories=categories)
        (root / f'{part}.json').write_text(json.dumps(everything))
    return root


def write_segmentation(root: Path) -> Path:
    """Images in `images/` and label maps in `labels/`, each with `train/` (6) and `val/` (2)."""
    generator = np.random.default_rng(0)
    for part, count in (('train', 6), ('val', 2)):
        for folder in ('images', 'labels'):
            (root / folder / part).mkdir(parents=True)
        for index in range(count):
            image, boxes = scene(generator)
            labels = np.zeros(image.shape[:2], np.uint8)
            for kind, x, y, w, h in boxes:
                labels[y : y + h, x : x + w] = kind + 1
            cv2.imwrite(str(root / 'images' / part / f'{index}.png'), image)
            cv2.imwrite(str(root / 'labels' / part / f'{index}.png'), labels)
    return root


def coco_loader(root: Path, part: str, pipeline: list[dict[str, Any]] | None = None) -> dict:
    """What a loader of an upstream COCO config needs to read this set."""
    dataset = dict(
        data_root=str(root),
        ann_file=f'{part}.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=CLASSES),
    )
    if pipeline is not None:
        dataset.update(pipeline=pipeline)
    return dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)


def short_run(work_dir: Path, **changes: Any) -> dict[str, Any]:
    """Keys that every run here sets the same way, and no interval longer than the run."""
    common = dict(
        work_dir=str(work_dir),
        default_hooks=dict(
            checkpoint=dict(interval=1, max_keep_ckpts=-1),
            logger=dict(interval=1),
            visualization=dict(interval=1),
        ),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        log_processor=dict(window_size=1),
        randomness=dict(seed=0),
    )
    return merged(common, changes)


def yolox(root: Path, work_dir: Path) -> dict[str, Any]:
    """Changes to upstream's YOLOX-tiny: 5 epochs of 3 iterations, with all of its hooks.

    The last validation leaves its predictions in `predictions.pkl`.
    """
    mosaic = [
        dict(type='Mosaic', img_scale=(64, 64), pad_val=114.0),
        dict(type='RandomAffine', scaling_ratio_range=(0.5, 1.5), border=(-32, -32)),
        dict(type='YOLOXHSVRandomAug'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
        dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
        dict(type='PackDetInputs'),
    ]
    train, val = coco_loader(root, 'train'), coco_loader(root, 'val')
    train['dataset'] = dict(dataset=train['dataset'], pipeline=mosaic)
    scores = dict(
        type='CocoMetric',
        ann_file=str(root / 'val.json'),
        metric=['bbox', 'proposal'],
        proposal_nums=(1, 10, 100),
    )
    predictions = dict(type='DumpDetResults', out_file_path=str(work_dir / 'predictions.pkl'))
    load = dict(type='LoadImageFromFile')
    augmented = dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(size, size), keep_ratio=True) for size in (64, 96)],
            [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)],
            [dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0)))],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [dict(type='PackDetInputs', meta_keys=(*META_KEYS, 'flip', 'flip_direction'))],
        ],
    )
    resize = dict(
        type='BatchSyncRandomResize', random_size_range=(64, 128), size_divisor=32, interval=2
    )
    average = dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.1, update_buffers=True)
    return short_run(
        work_dir,
        model=dict(
            data_preprocessor=dict(batch_augments=[resize]),
            backbone=dict(widen_factor=0.125),
            neck=dict(in_channels=[32, 64, 128], out_channels=32),
            bbox_head=dict(num_classes=3, in_channels=32, feat_channels=32),
            test_cfg=dict(score_thr=0.0),
        ),
        train_dataloader=train,
        val_dataloader=val,
        test_dataloader=val,
        val_evaluator=[scores, predictions],
        test_evaluator=scores,
        tta_model=dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.65), max_per_img=100),
        ),
        tta_pipeline=[load, augmented],
        max_epochs=5,
        train_cfg=dict(max_epochs=5, val_interval=5, dynamic_intervals=[(5, 1)]),
        custom_hooks=[
            dict(type='YOLOXModeSwitchHook', num_last_epochs=1, priority=48),
            dict(type='SyncNormHook', priority=48),
            dict(**average, priority=49),
            dict(type='InputSize'),
        ],
        custom_imports=dict(imports=['engine.tiny_sets']),
    )


def two_epochs(root: Path, work_dir: Path, annotations: dict[str, Any], **changes: Any) -> dict:
    """Changes to an upstream detector of the 1x schedule: 6 iterations, images of two sizes."""
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', **annotations)]
    train = [
        *load,
        dict(type='RandomChoiceResize', scales=[(64, 64), (96, 96)], keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    test = [
        *load,
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=META_KEYS),
    ]
    val = coco_loader(root, 'val', test)
    evaluator = dict(ann_file=str(root / 'val.json'))
    common = short_run(
        work_dir,
        train_dataloader=coco_loader(root, 'train', train),
        val_dataloader=val,
        test_dataloader=val,
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        train_cfg=dict(max_epochs=2, val_interval=2),
        param_scheduler=[dict(type='MultiStepLR', milestones=[1], gamma=0.1)],
        default_hooks=dict(checkpoint=dict(by_epoch=False)),
    )
    return merged(common, changes)


def retinanet(root: Path, work_dir: Path, **backbone: Any) -> dict[str, Any]:
    """Changes to upstream's RetinaNet R18: frozen stages, a head shared over five levels."""
    return two_epochs(
        root,
        work_dir,
        dict(with_bbox=True),
        model=dict(
            backbone=dict(base_channels=8, init_cfg=None, **backbone),
            neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
            bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2),
        ),
    )


def mask_rcnn(root: Path, work_dir: Path) -> dict[str, Any]:
    """Changes to upstream's Mask R-CNN R50: DCNv2, weight standardisation, a transposed layer."""
    dcn = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)
    narrow = dict(in_channels=16, num_classes=3)
    return two_epochs(
        root,
        work_dir,
        dict(with_bbox=True, with_mask=True),
        optim_wrapper=dict(optimizer=dict(lr=0.001), clip_grad=dict(max_norm=1.0)),
        model=dict(
            backbone=dict(
                base_channels=4,
                init_cfg=None,
                dcn=dcn,
                stage_with_dcn=(False, False, False, True),
            ),
            neck=dict(in_channels=[16, 32, 64, 128], out_channels=16, conv_cfg=dict(type='ConvWS')),
            rpn_head=dict(in_channels=16, feat_channels=16),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=16),
                bbox_head=dict(fc_out_channels=32, **narrow),
                mask_roi_extractor=dict(out_channels=16),
                mask_head=dict(num_convs=1, conv_out_channels=16, **narrow),
            ),
        ),
    )


def deeplab(root: Path, work_dir: Path) -> dict[str, Any]:
    """Changes to upstream's DeepLabV3+ R18: SyncBN, an auxiliary head, 30 iterations."""
    crop = (64, 64)
    train = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomResize', scale=(96, 96), ratio_range=(0.7, 1.3), keep_ratio=True),
        dict(type='RandomCrop', crop_size=crop, cat_max_ratio=0.9),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs'),
    ]
    test = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=crop, keep_ratio=True),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]
    loaders = {}
    for part, pipeline in (('train', train), ('val', test)):
        dataset = dict(
            _delete_=True,
            type='BaseSegDataset',
            data_root=str(root),
            data_prefix=dict(img_path=f'images/{part}', seg_map_path=f'labels/{part}'),
            img_suffix='.png',
            metainfo=dict(
                classes=('ground', *CLASSES),
                palette=[[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]],
            ),
            pipeline=pipeline,
        )
        size = 2 if part == 'train' else 1
        loaders[part] = dict(
            batch_size=size, num_workers=0, persistent_workers=False, dataset=dataset
        )
    augmented = dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in (0.75, 1.0)],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    )
    return short_run(
        work_dir,
        crop_size=crop,
        data_preprocessor=dict(size=crop),
        model=dict(
            data_preprocessor=dict(size=crop),
            pretrained=None,
            backbone=dict(base_channels=8, stem_channels=8),
            decode_head=dict(
                in_channels=64,
                channels=16,
                c1_in_channels=8,
                c1_channels=8,
                num_classes=4,
                loss_decode=dict(class_weight=[0.1, 1.0, 1.0, 1.0]),
            ),
            auxiliary_head=dict(in_channels=32, channels=8, num_classes=4),
        ),
        train_dataloader=loaders['train'],
        val_dataloader=loaders['val'],
        test_dataloader=loaders['val'],
        val_evaluator=dict(iou_metrics=['mIoU', 'mDice']),
        test_evaluator=dict(iou_metrics=['mIoU', 'mDice']),
        tta_pipeline=[dict(type='LoadImageFromFile'), augmented],
        optim_wrapper=dict(optimizer=dict(lr=0.05)),
        train_cfg=dict(max_iters=30, val_interval=30),
        default_hooks=dict(checkpoint=dict(interval=30)),
    )


@HOOKS.register_module()
class InputSize(Hook):
    """Logs the height of the images that the last iteration trained with."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        height = runner.model.data_preprocessor.batch_augments[0]._input_size
        if height is not None:
            runner.message_hub.update_scalar('train/input_height', height[0])
