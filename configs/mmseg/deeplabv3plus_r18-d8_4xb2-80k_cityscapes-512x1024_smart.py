# DeepLabV3+ with ResNet-18 on Cityscapes, 50 % of the weights removed. Give as `load_from`:
# upstream's deeplabv3plus_r18-d8_512x1024_80k_cityscapes_20201226_080942-cff257fe.pth
_base_ = [
    'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/smart.py',
]

smart = dict(sparsity=0.5)
