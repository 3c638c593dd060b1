# RetinaNet with ResNet-18 on COCO, 50 % of the weights removed. Give as `load_from`:
# upstream's retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth
_base_ = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
