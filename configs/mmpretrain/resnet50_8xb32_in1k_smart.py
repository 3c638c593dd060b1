# ResNet-50 on ImageNet-1k, 70 % of the weights removed in 30 epochs: 18 of search, 12 of
# fine-tuning; see docs/recipes/imagenet.md. Give as `load_from`:
# upstream's resnet50_8xb32_in1k_20210831-ea4938fc.pth
_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
# A fifth of upstream's, on one cosine over search and fine-tuning instead of three steps.
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = dict(
    _delete_=True,
    type='CosineAnnealingLR',
    T_max=max_epochs,
    by_epoch=True,
    convert_to_iter_based=True,
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
