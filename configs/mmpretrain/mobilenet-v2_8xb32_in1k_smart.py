# MobileNetV2 on ImageNet-1k, 50 % of the weights removed. Give as `load_from`:
# upstream's mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth
_base_ = ['mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
