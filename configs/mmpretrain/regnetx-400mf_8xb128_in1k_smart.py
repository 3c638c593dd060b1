# RegNetX-400MF on ImageNet-1k, 50 % of the weights removed. Give as `load_from`:
# upstream's regnetx-400mf_8xb128_in1k_20211213-89bfc226.pth
_base_ = ['mmpretrain::regnet/regnetx-400mf_8xb128_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
