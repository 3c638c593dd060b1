# All three stages in one run, 80 % of the weights removed: 24 epochs train dense as in
# yolox_tiny_scenes.py, 12 search what to keep, 12 fine-tune it. The learning rate falls once for
# the dense stage and once for the two others.
_base_ = ['./yolox_tiny_scenes.py', '../_base_/smart.py']

max_epochs = 48
smart = dict(sparsity=0.8, stages=dict(pretrain=0.5, search=0.25, finetune=0.25))
param_scheduler = [
    dict(type='mmdet.QuadraticWarmupLR', by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='CosineRestartLR',
        by_epoch=True,
        begin=1,
        end=max_epochs,
        periods=[23, 24],
        restart_weights=[1, 0.5],
        eta_min=0.0001,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs)
# Mosaic ends where it does in the dense recipe, after 16 epochs.
custom_hooks = _base_.custom_hooks
custom_hooks[0].update(num_last_epochs=32)
