# ResNet-50 on ImageNet-1k, 70 % of the weights removed. Give as `load_from`:
# upstream's resnet50_8xb32_in1k_20210831-ea4938fc.pth
_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
