# Prune DeepLabV3+ on CamVid, 70 % of the weights: 400 iterations of search, 300 of fine-tuning.
# Train deeplabv3plus_r18_camvid.py first and give its checkpoint as `load_from`.
_base_ = ['./deeplabv3plus_r18_camvid.py', '../_base_/smart.py']

smart = dict(sparsity=0.7, stages=dict(pretrain=0.0, search=4 / 7, finetune=3 / 7))
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=700, by_epoch=False)]
train_cfg = dict(max_iters=700, val_interval=350)
