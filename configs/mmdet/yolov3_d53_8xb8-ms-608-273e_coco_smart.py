# YOLOv3 with Darknet-53 on COCO, 70 % of the weights removed. Give as `load_from`:
# upstream's yolov3_d53_mstrain-608_273e_coco_20210518_115020-a2c3acb8.pth
_base_ = ['mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
