# Dense recipe: BiSeNetV2 on CamVid from random weights, for two CPU cores: small crops, a short
# schedule.
_base_ = [
    'mmseg::_base_/models/bisenetv2.py',
    '../_base_/datasets/camvid.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
auxiliary = [
    dict(
        type='FCNHead',
        in_channels=in_channels,
        channels=channels,
        num_convs=2,
        num_classes=11,
        in_index=index,
        norm_cfg=norm_cfg,
        concat_input=False,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    )
    for index, (in_channels, channels) in enumerate([(16, 16), (32, 32), (64, 64), (128, 128)], 1)
]
model = dict(
    data_preprocessor=dict(size=(144, 192)),
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(num_classes=11, channels=256, norm_cfg=norm_cfg),
    auxiliary_head=auxiliary,
)
optim_wrapper = dict(optimizer=dict(lr=0.03))
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.1, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=100, end=1400, by_epoch=False),
]
train_cfg = dict(max_iters=1400, val_interval=350)
default_hooks = dict(checkpoint=dict(interval=350, max_keep_ckpts=2), logger=dict(interval=20))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
