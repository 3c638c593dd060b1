# YOLOX-tiny on COCO, 50 % of the weights removed. Give as `load_from`:
# upstream's yolox_tiny_8x8_300e_coco_20211124_171234-b4047906.pth
_base_ = ['mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
