# DeepLabV3 with ResNet-50 on Cityscapes, 70 % of the weights removed. Give as `load_from`:
# upstream's deeplabv3_r50-d8_512x1024_80k_cityscapes_20200606_113404-b92cfdd4.pth
_base_ = ['mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
