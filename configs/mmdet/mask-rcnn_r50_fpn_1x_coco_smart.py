# Mask R-CNN with ResNet-50 on COCO, 70 % of the weights removed. Give as `load_from`:
# upstream's mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
