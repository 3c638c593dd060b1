# FCOS with ResNet-50 on COCO, 70 % of the weights removed. Give as `load_from`:
# upstream's fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth
_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
