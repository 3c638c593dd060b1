# UNet on Cityscapes, 70 % of the weights removed. Give as `load_from`:
# upstream's fcn_unet_s5-d16_4x4_512x1024_160k_cityscapes_20211210_145204-6860854e.pth
_base_ = ['mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
