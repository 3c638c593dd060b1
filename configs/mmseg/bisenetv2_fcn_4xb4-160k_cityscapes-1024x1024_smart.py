# BiSeNetV2 on Cityscapes, 50 % of the weights removed. Give as `load_from`:
# upstream's bisenetv2_fcn_4x4_1024x1024_160k_cityscapes_20210902_015551-bcf10f09.pth
_base_ = ['mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
