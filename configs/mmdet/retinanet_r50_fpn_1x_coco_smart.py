# RetinaNet with ResNet-50 on COCO, 70 % of the weights removed. Give as `load_from`:
# upstream's retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
