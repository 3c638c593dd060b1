# Dense recipe: YOLOX-tiny at two thirds of its width on scenes of handwritten digits, 96x96
# pixels. Needs no download and starts from random weights.
_base_ = ['mmdet::yolox/yolox_tiny_8xb8-300e_coco.py']

max_epochs = 24
num_last_epochs = 8
img_scale = (96, 96)
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(widen_factor=0.25),
    neck=dict(in_channels=[64, 128, 256], out_channels=64),
    bbox_head=dict(num_classes=10, in_channels=64, feat_channels=64),
)

# Upstream's without RandomFlip: a mirrored digit is none.
train_pipeline = [
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0),
    dict(
        type='RandomAffine',
        scaling_ratio_range=(0.75, 1.25),
        border=(-img_scale[0] // 2, -img_scale[1] // 2),
    ),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='Resize', scale=img_scale, keep_ratio=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromNDArray'),
    dict(type='Resize', scale=img_scale, keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        dataset=dict(
            _delete_=True,
            type='mmsmart.DigitScenes',
            split='train',
            scenes=320,
            size=96,
            digits=(3, 8),
            pixels=(16, 40),
            pipeline=[
                dict(type='LoadImageFromNDArray'),
                dict(type='LoadAnnotations', with_bbox=True),
            ],
        ),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='mmsmart.DigitScenes',
        split='test',
        scenes=96,
        size=96,
        digits=(3, 8),
        pixels=(16, 40),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# Without a file the ground truth is that of the data set.
val_evaluator = dict(ann_file=None, metric_items=['mAP', 'mAP_50', 'mAP_75'])
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=0.002, weight_decay=0.01))
param_scheduler = [
    dict(type='mmdet.QuadraticWarmupLR', by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0001,
        begin=1,
        end=max_epochs - 4,
        T_max=max_epochs - 4,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type='ConstantLR',
        by_epoch=True,
        factor=1,
        begin=max_epochs - 4,
        end=max_epochs,
    ),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=12)
default_hooks = dict(checkpoint=dict(interval=12, max_keep_ckpts=-1), logger=dict(interval=20))
# Upstream's with the numbers of a short run: the average looks back over the last hundred steps.
custom_hooks = [
    dict(type='YOLOXModeSwitchHook', num_last_epochs=num_last_epochs, priority=48),
    dict(type='SyncNormHook', priority=48),
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.005,
        gamma=100,
        update_buffers=True,
        priority=49,
    ),
]
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
