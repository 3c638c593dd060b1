# All three stages in one run, 80 % of the weights removed: 24 epochs train dense as in
# resnet18_digits.py, 18 search what to keep, 18 fine-tune it. The learning rate falls once for the
# dense stage and once for the two others.
_base_ = ['./resnet18_digits.py', '../_base_/smart.py']

smart = dict(sparsity=0.8, stages=dict(pretrain=0.4, search=0.3, finetune=0.3))
param_scheduler = dict(
    _delete_=True,
    type='CosineRestartLR',
    by_epoch=True,
    periods=[24, 36],
    restart_weights=[1, 1],
    eta_min=0,
    convert_to_iter_based=True,
)
train_cfg = dict(max_epochs=60)
