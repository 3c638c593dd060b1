# DeiT-small on ImageNet-1k, 50 % of the weights removed. Give as `load_from`:
# upstream's deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth
_base_ = ['mmpretrain::deit/deit-small_4xb256_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
