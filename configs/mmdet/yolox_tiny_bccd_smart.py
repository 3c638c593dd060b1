# Prune YOLOX-tiny on BCCD, 70 % of the weights: 9 epochs of search, 7 of fine-tuning. Train
# yolox_tiny_bccd.py first and give its checkpoint as `load_from`.
_base_ = ['./yolox_tiny_bccd.py', '../_base_/smart.py']

smart = dict(sparsity=0.7, stages=dict(pretrain=0.0, search=9 / 16, finetune=7 / 16))

max_epochs, num_last_epochs, base_lr = 16, 3, 0.005
param_scheduler = [
    dict(type='mmdet.QuadraticWarmupLR', by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.05,
        begin=1,
        T_max=max_epochs - num_last_epochs,
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
train_cfg = dict(max_epochs=max_epochs, val_interval=4, dynamic_intervals=[(max_epochs - 1, 1)])
custom_hooks = [
    dict(type='YOLOXModeSwitchHook', num_last_epochs=num_last_epochs, priority=48),
    dict(type='SyncNormHook', priority=48),
    dict(
        type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, update_buffers=True, priority=49
    ),
]
