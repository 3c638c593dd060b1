# Prune the small ResNet at 90 % in blocks of 8x8: 4 epochs of search, 3 of fine-tuning. Train
# resnet14_1xb64_cifar10.py first and give its checkpoint as `load_from`. Stem and classifier stay
# dense, as is usual where methods are compared: a magnitude threshold would cut whole classes off.
_base_ = ['./resnet14_1xb64_cifar10.py', '../_base_/smart.py']

smart = dict(
    sparsity=0.9,
    block=(8, 8, 1, 1),
    stages=dict(pretrain=0.0, search=4 / 7, finetune=3 / 7),
    layers=[dict(pattern='backbone.conv1', exclude=True), dict(pattern='head', exclude=True)],
)
param_scheduler = dict(T_max=7)
train_cfg = dict(max_epochs=7, val_interval=1)
