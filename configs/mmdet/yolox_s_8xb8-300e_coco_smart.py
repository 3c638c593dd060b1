# YOLOX-s on COCO, 70 % of the weights removed in 60 epochs: 36 of search, 24 of fine-tuning, of
# them the last 15 without mosaic and mix-up; see docs/recipes/coco.md. Give as `load_from`:
# upstream's yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth
_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
max_epochs = 60
num_last_epochs = 15  # upstream's, as in its YOLOXModeSwitchHook
interval = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=interval)
# Half of upstream's, and its schedule on a shorter run.
base_lr = 0.005
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(
        type='mmdet.QuadraticWarmupLR',
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.05,
        begin=1,
        T_max=max_epochs - num_last_epochs - 1,
        end=max_epochs - num_last_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type='ConstantLR',
        by_epoch=True,
        factor=1,
        begin=max_epochs - num_last_epochs,
        end=max_epochs,
    ),
]
default_hooks = dict(checkpoint=dict(interval=interval))
randomness = dict(seed=0)
