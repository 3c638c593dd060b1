# All three stages in one run: train dense, search what to keep at 80 % sparsity, fine-tune it.
_base_ = ['./resnet18_digits.py', '../_base_/smart.py']

smart = dict(sparsity=0.8, stages=dict(pretrain=0.4, search=0.35, finetune=0.25))
