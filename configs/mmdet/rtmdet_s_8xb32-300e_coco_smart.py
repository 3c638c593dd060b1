# RTMDet-s on COCO, 50 % of the weights removed. Give as `load_from`:
# upstream's rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth
_base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
