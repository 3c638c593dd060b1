# ResNet-18 on CIFAR-10, 80 % of the weights removed in blocks of 16x8: all three stages in one run
# of the dense recipe, resnet18_8xb16_cifar10.py. To begin with the search, give that recipe's
# checkpoint as `load_from` and write stages=dict(pretrain=0.0, search=0.6, finetune=0.4).
_base_ = ['./resnet18_8xb16_cifar10.py', '../_base_/smart.py']

smart = dict(sparsity=0.8, stages=dict(pretrain=0.3, search=0.4, finetune=0.3))
