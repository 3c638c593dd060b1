# All three stages of Mask R-CNN in one short run on a few real COCO images: 1 epoch dense, 2 of
# search, 1 of fine-tuning, 50 % of the weights removed.
_base_ = ['./mask-rcnn_r18_fpn_coco-small.py', '../_base_/smart.py']

smart = dict(sparsity=0.5, stages=dict(pretrain=0.25, search=0.5, finetune=0.25))
