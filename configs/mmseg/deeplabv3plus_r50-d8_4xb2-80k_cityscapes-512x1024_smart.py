# DeepLabV3+ with ResNet-50 on Cityscapes, 70 % of the weights removed in 40,000 iterations: 24,000
# of search, 16,000 of fine-tuning; see docs/recipes/cityscapes.md. Give as `load_from`:
# upstream's deeplabv3plus_r50-d8_512x1024_80k_cityscapes_20200606_114049-f9fb496d.pth
_base_ = [
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/smart.py',
]

# The auxiliary head is not deployed: dense, and outside the budget.
smart = dict(sparsity=0.7, layers=[dict(pattern='auxiliary_head', exclude=True)])
max_iters = 40000
interval = 4000
train_cfg = dict(max_iters=max_iters, val_interval=interval)
# A fifth of upstream's, on its polynomial made to end with the run.
optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = [
    dict(type='PolyLR', eta_min=2e-5, power=0.9, begin=0, end=max_iters, by_epoch=False)
]
default_hooks = dict(checkpoint=dict(interval=interval, max_keep_ckpts=2))
randomness = dict(seed=0)
