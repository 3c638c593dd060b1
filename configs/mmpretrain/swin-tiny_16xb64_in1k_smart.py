# Swin-tiny on ImageNet-1k, 50 % of the weights removed. Give as `load_from`:
# upstream's swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth
_base_ = ['mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
