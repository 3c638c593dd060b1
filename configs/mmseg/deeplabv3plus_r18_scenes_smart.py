# All three stages in one run, 80 % of the weights removed: 1600 iterations train dense as in
# deeplabv3plus_r18_scenes.py, 400 search what to keep, 400 fine-tune it. The learning rate falls
# once for the dense stage and once for the two others.
_base_ = ['./deeplabv3plus_r18_scenes.py', '../_base_/smart.py']

max_iters = 2400
smart = dict(sparsity=0.8, stages=dict(pretrain=2 / 3, search=1 / 6, finetune=1 / 6))
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=1600, by_epoch=False),
    dict(
        type='CosineRestartLR',
        begin=1600,
        end=max_iters,
        periods=[800],
        restart_weights=[0.5],
        eta_min=0,
        by_epoch=False,
    ),
]
train_cfg = dict(max_iters=max_iters)
