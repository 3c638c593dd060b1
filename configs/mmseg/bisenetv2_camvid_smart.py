# Prune BiSeNetV2 on CamVid, 70 % of the weights: 400 iterations of search, 300 of fine-tuning. The
# auxiliary heads are of no use after training and stay out of the budget. Train bisenetv2_camvid.py
# first and give its checkpoint as `load_from`.
_base_ = ['./bisenetv2_camvid.py', '../_base_/smart.py']

smart = dict(
    sparsity=0.7,
    stages=dict(pretrain=0.0, search=4 / 7, finetune=3 / 7),
    layers=[dict(pattern='auxiliary_head', exclude=True)],
)
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.1, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=100, end=700, by_epoch=False),
]
train_cfg = dict(max_iters=700, val_interval=350)
