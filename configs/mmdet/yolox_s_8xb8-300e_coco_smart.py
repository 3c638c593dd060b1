# YOLOX-s on COCO, 70 % of the weights removed. Give as `load_from`:
# upstream's yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth
_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
