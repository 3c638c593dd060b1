# Prune RetinaNet on BCCD, 70 % of the weights: 9 epochs of search, 7 of fine-tuning. Train
# retinanet_r18_fpn_bccd.py first and give its checkpoint as `load_from`.
_base_ = ['./retinanet_r18_fpn_bccd.py', '../_base_/smart.py']

smart = dict(sparsity=0.7, stages=dict(pretrain=0.0, search=9 / 16, finetune=7 / 16))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=16, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=16, val_interval=4)
