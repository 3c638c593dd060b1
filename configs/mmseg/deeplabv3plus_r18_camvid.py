# Dense recipe: DeepLabV3+ with ResNet-18 on CamVid from random weights, for two CPU cores: output
# stride 16 instead of 8, small crops, a short schedule.
_base_ = [
    'mmseg::_base_/models/deeplabv3plus_r50-d8.py',
    '../_base_/datasets/camvid.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(144, 192)),
    backbone=dict(depth=18, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=512,
        channels=128,
        dilations=(1, 6, 12, 18),
        c1_in_channels=64,
        c1_channels=12,
        num_classes=11,
        norm_cfg=norm_cfg,
    ),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=11, norm_cfg=norm_cfg),
)
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=1400, by_epoch=False)]
train_cfg = dict(max_iters=1400, val_interval=350)
default_hooks = dict(checkpoint=dict(interval=350, max_keep_ckpts=2), logger=dict(interval=20))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
