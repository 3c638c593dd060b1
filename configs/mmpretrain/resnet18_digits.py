# Dense recipe: a narrow ResNet-18 on the handwritten digits that ship with scikit-learn, scaled to
# 32x32 pixels. Needs no download; a minute or two on a CPU.
_base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py']

model = dict(backbone=dict(stem_channels=16, base_channels=16), head=dict(in_channels=128))
data_preprocessor = dict(mean=[77.0] * 3, std=[95.0] * 3)

train_pipeline = [
    dict(type='Resize', scale=32),
    dict(type='RandomCrop', crop_size=32, padding=2),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='Resize', scale=32), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(_delete_=True, type='mmsmart.Digits', split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=150,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(_delete_=True, type='mmsmart.Digits', split='test', pipeline=test_pipeline),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=5e-4))
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', by_epoch=True, T_max=24, convert_to_iter_based=True
)
train_cfg = dict(max_epochs=24, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3, max_keep_ckpts=2), logger=dict(interval=10))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
