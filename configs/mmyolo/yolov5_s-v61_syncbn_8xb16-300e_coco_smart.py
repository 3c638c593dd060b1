# YOLOv5-s on COCO, 50 % of the weights removed; needs mmyolo. Give as `load_from`:
# upstream's yolov5_s-v61_syncbn_fast_8xb16-300e_coco_20220918_084700-86e02187.pth
_base_ = ['mmyolo::yolov5/yolov5_s-v61_syncbn_8xb16-300e_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
