# All three stages in one run, 80 % of the weights removed: 8 epochs train dense as in
# mask-rcnn_r18_fpn_scenes.py, 4 search what to keep, 4 fine-tune it. The learning rate falls once
# for the dense stage and once for the two others.
_base_ = ['./mask-rcnn_r18_fpn_scenes.py', '../_base_/smart.py']

max_epochs = 16
smart = dict(sparsity=0.8, stages=dict(pretrain=0.5, search=0.25, finetune=0.25))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True
    ),
    dict(
        type='CosineRestartLR',
        by_epoch=True,
        begin=1,
        end=max_epochs,
        periods=[7, 8],
        restart_weights=[1, 1],
        eta_min=0,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs)
