# Cut channels out of the small ResNet: 70 % of the MACs leave, with their coupled channels. Train
# resnet14_1xb64_cifar10.py first and give its checkpoint as `load_from`.
_base_ = ['./resnet14_1xb64_cifar10.py', '../_base_/smart.py']

smart = dict(
    sparsity=0.7,
    block='channel',
    resource='macs',
    stages=dict(pretrain=0.0, search=4 / 7, finetune=3 / 7),
)
param_scheduler = dict(T_max=7)
train_cfg = dict(max_epochs=7, val_interval=1)
