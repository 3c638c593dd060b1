# Dense recipe of a ResNet that two CPU cores can train: three stages of 32, 64 and 128 channels at
# 16, 8 and 4 pixels, 10 epochs over 20,000 training images.
_base_ = ['./resnet18_8xb16_cifar10.py']

model = dict(
    backbone=dict(
        num_stages=3,
        strides=(2, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stem_channels=32,
        base_channels=32,
    ),
    head=dict(in_channels=128),
)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    drop_last=True,
    dataset=dict(indices=20000),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    persistent_workers=False,
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=5e-4))
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', by_epoch=True, T_max=10, convert_to_iter_based=True
)
train_cfg = dict(max_epochs=10, val_interval=10)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), logger=dict(interval=50))
randomness = dict(seed=0)
