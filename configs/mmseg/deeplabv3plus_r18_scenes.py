# Dense recipe: a narrow DeepLabV3+ with ResNet-18 on scenes of handwritten digits, 96x96 pixels.
# Needs no download and starts from random weights.
_base_ = ['mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py']

max_iters = 1600
norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN does not train on a CPU
class_weight = [1.0] + [3.0] * 10  # most pixels are background
data_preprocessor = dict(size=(96, 96))
model = dict(
    pretrained=None,
    data_preprocessor=data_preprocessor,
    backbone=dict(base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=128,
        c1_in_channels=16,
        channels=64,
        dilations=(1, 2, 4, 6),
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=64,
        channels=32,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)

# Upstream's without RandomFlip: a mirrored digit is none.
train_pipeline = [
    dict(type='LoadImageFromNDArray'),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromNDArray'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='mmsmart.SegmentedDigitScenes',
        split='train',
        scenes=480,
        size=96,
        digits=(8, 14),
        pixels=(20, 32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='mmsmart.SegmentedDigitScenes',
        split='test',
        scenes=96,
        size=96,
        digits=(8, 14),
        pixels=(20, 32),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=max_iters, by_epoch=False)
]
train_cfg = dict(max_iters=max_iters, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=800, max_keep_ckpts=-1), logger=dict(interval=20))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
