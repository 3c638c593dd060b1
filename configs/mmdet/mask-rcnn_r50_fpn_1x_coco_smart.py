# Mask R-CNN with ResNet-50 on COCO, 70 % of the weights removed in 12 epochs: the search ends
# after 7.2, before the learning rate falls at 8 and 11; see docs/recipes/coco.md. Give as
# `load_from`: upstream's mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/smart.py']

smart = dict(sparsity=0.7)
# A fifth of upstream's; its 1x schedule is short enough as it is.
optim_wrapper = dict(optimizer=dict(lr=0.004))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
