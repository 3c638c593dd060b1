# Faster R-CNN with ResNet-50 on COCO, 70 % of the weights removed. Give as `load_from`:
# upstream's faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
