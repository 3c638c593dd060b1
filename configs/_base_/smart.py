# One more base file that turns a stock training config into a pruning run:
#
#     _base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py', 'mmsmart::_base_/smart.py']
#     smart = dict(sparsity=0.8)
#
# Every stock tools/train.py builds the runner that `runner_type` names. Below are the defaults;
# docs/configuration.md says what each key does.
runner_type = 'mmsmart.SmartRunner'
smart = dict(
    # Not set here, since a dict can't inherit from a number:
    # sparsity: share of the resource to remove, in [0, 1), 0.5 if not given; or by resource,
    #     dict(params=0.6, macs=0.5), or by part, dict(backbone=0.8, neck=0.6)
    # max_drop: instead of a sparsity, points of the validated metric that may be lost, for which
    #     short runs find the highest
    # latency: for budgets of latency, path of a YAML or JSON table, or the table as a dict
    # distillation: weight of a term in the loss that keeps the network's outputs near those of the
    #     dense one, or dict(weight=5.0, of='outputs'), or 'features', the backbone's
    # (out, in, kh, kw), -1 is the whole axis, or as a string, '16x8'; '2:4', two of every four
    # weights along the input axis; or 'channel', coupled channels that can be cut out
    block=(16, 8, 1, 1),
    # with 'channel': channels left in each group are a multiple of it
    round_to=1,
    # what a plain sparsity counts: 'params', 'macs' or 'latency'
    resource='params',
    # 'smart', or a rival to compare it with, such as 'magnitude' or 'agp', and what it can be told
    method='smart',
    method_cfg=dict(),
    # shares of the run's iterations; they add up to 1
    stages=dict(pretrain=0.0, search=0.6, finetune=0.4),
    # softness of the mask, falling over the search: 'geometric', 'linear' or 'cosine'
    temperature=dict(start=1.0, end=0.01, shape='geometric'),
    # first importance (a weak one: what the search learns counts), how strongly it follows the
    # curvature of the loss, and the optimiser of what is learnt besides
    importance=dict(
        init='magnitude',
        scale=0.1,
        batches=16,
        curvature=1.0,
        lr=0.01,
        optimizer=dict(type='Adam'),
    ),
    # overrides by name, such as dict(pattern='head', exclude=True) or min_density=0.1 there
    layers=[],
    # training batches over which BatchNorm is measured anew when the masks turn hard; 0 for none
    recalibrate=0,
)
