# ResNet-18 on ImageNet-1k, 50 % of the weights removed. Give as `load_from`:
# upstream's resnet18_8xb32_in1k_20210831-fbbb1da6.pth
_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
