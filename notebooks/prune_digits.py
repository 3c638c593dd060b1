# %% [markdown]
# # Prune a classifier, step by step
#
# A small ResNet-18 learns scikit-learn's handwritten digits, then loses 80 % of its weights in
# blocks of 16x8 while it goes on training. Nothing is downloaded; it takes three minutes on one CPU
# core.
#
# `prune_digits.ipynb` is made from `prune_digits.py` by `convert.py`: change the script.

# %%
import json
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from rich import print

from mmsmart import masks_of
from mmsmart.datasets import Digits
from mmsmart.engine.stock_tools import enable_inheritance
from mmsmart.report import summary_tables
from mmsmart.shipped import configs_folder

DENSE_EPOCHS = 20
PRUNING_EPOCHS = 16
WORK_DIR = Path('work_dirs/notebook')

WORK_DIR.mkdir(parents=True, exist_ok=True)
warnings.filterwarnings('ignore')
torch.set_num_threads(1)  # layers this small gain nothing from more
enable_inheritance()  # of `mmsmart::` and `mmpretrain::`, as tools/train.py does


def show(figure, name):
    """Save a figure, and show it where there is a notebook around."""
    file = WORK_DIR / f'{name}.png'
    figure.savefig(file, dpi=80)
    try:
        from IPython.display import Image, display
    except ModuleNotFoundError:
        print(f'{name}: {file}')
    else:
        display(Image(file))


# %% [markdown]
# ## The data
#
# 1347 images for training and 450 for the test, 8x8 pixels, ten classes.

# %%
digits = Digits('test')
figure = Figure(figsize=(9, 1.3), layout='constrained')
for axes, digit in zip(figure.subplots(1, 10), digits):
    axes.imshow(digit['img'], cmap='gray')
    axes.set_title(digit['gt_label'])
    axes.axis('off')
show(figure, 'digits')

# %% [markdown]
# ## 1. A trained model
#
# From an ordinary config of mmpretrain. Nothing of mmsmart takes part but the data set. If you have
# a checkpoint already, this is where it goes.

# %%
config = Config.fromfile(configs_folder() / 'mmpretrain/resnet18_digits.py')
config.merge_from_dict(
    {
        'work_dir': str(WORK_DIR / 'dense'),
        'log_level': 'ERROR',
        'train_cfg.max_epochs': DENSE_EPOCHS,
        'param_scheduler.T_max': DENSE_EPOCHS,
        'default_hooks.checkpoint.interval': DENSE_EPOCHS,
    }
)
Runner.from_cfg(config).train()
checkpoint = WORK_DIR / f'dense/epoch_{DENSE_EPOCHS}.pth'
print(f'trained: {checkpoint}')

# %% [markdown]
# ## 2. The pruning config
#
# The same config and one more base file. `smart` has the defaults of that file and what is
# overridden here. The run is as long as the config says; the learning-rate schedule has to end with
# it.

# %%
smart_config = WORK_DIR / 'resnet18_digits_smart.py'
smart_config.write_text(f"""
_base_ = ['{configs_folder()}/mmpretrain/resnet18_digits.py', 'mmsmart::_base_/smart.py']
load_from = '{checkpoint}'
smart = dict(sparsity=0.8, block=(16, 8, 1, 1))
train_cfg = dict(max_epochs={PRUNING_EPOCHS})
param_scheduler = dict(T_max={PRUNING_EPOCHS})
work_dir = '{WORK_DIR}/pruned'
log_level = 'ERROR'
""")
pruning = Config.fromfile(smart_config)
print(pruning.smart.to_dict())

# %% [markdown]
# ## 3. What can be pruned
#
# The masks are there as soon as the runner has built its optimiser. Every convolution and linear
# layer is cut into blocks; the budget is one number for all of them.


# %%
class Watch(Hook):
    """Notes what the masks do, iteration by iteration."""

    def __init__(self):
        self.notes, self.soft_masks = [], []

    def before_train(self, runner):
        masks = masks_of(runner.model)
        print(f'{masks.num_blocks} blocks in {len(masks.layers)} layers')
        for layer in masks.layers[:4]:
            print(f'  {layer.name} {tuple(layer.weight.shape)}: {layer.num_blocks} blocks')
        print('  ...')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        masks = masks_of(runner.model)
        if masks.state == 'soft':
            self.notes.append((masks.temperature, masks.undecided(), masks.soft_sparsity()))
            self.soft_masks.append(masks.mask().clone())


# %% [markdown]
# ## 4. Search and fine-tuning
#
# In the first 60 % of the run weights and importance are trained together, while the temperature
# falls. Then the masks turn hard, and what is kept is fine-tuned.

# %%
watch = Watch()
runner = RUNNERS.build(pruning)
runner.register_hook(watch)
runner.train()
masks = masks_of(runner.model)
print(f'masks are {masks.state}: {masks.kept_cost():.0f} weights kept of {masks.total_cost:.0f}')

# %% [markdown]
# ## 5. How soft masks turn hard
#
# The share that the masks remove is the target at every step. The number to watch is the share of
# undecided blocks: it should fall over the whole search.

# %%
temperature, undecided, sparsity = zip(*watch.notes)
figure = Figure(figsize=(9, 2.8), layout='constrained')
left, right = figure.subplots(1, 2)
left.semilogy(temperature, label='temperature')
left.semilogy(undecided, label='undecided blocks')
left.semilogy(sparsity, label='sparsity')
left.set_xlabel('iteration of the search')
left.legend()
for share in (0, 0.5, 1):
    mask = watch.soft_masks[int(share * (len(watch.soft_masks) - 1))]
    right.plot(mask.sort().values.numpy(), label=f'at {share:.0%} of the search')
right.set_xlabel('block, sorted')
right.set_ylabel('mask')
right.legend()
show(figure, 'hardening')

# %% [markdown]
# ## 6. What it came to
#
# `pruning.json` has the budget, every layer, and the metrics of the dense and of the pruned model.

# %%
report = json.loads((WORK_DIR / 'pruned/pruning.json').read_text())
print(f'kept {report["kept"]:.0f} of a budget of {report["budget"]:.1f}')
for table in reversed(summary_tables(report)):
    print(table)

# %% [markdown]
# Where the network was cut: the first layers keep most.

# %%
rows = report['layers']
figure = Figure(figsize=(9, 4), layout='constrained')
axes = figure.subplots()
axes.bar(range(len(rows)), [row['params_kept'] / row['params_total'] for row in rows])
axes.axhline(1 - report['target_sparsity'], color='black', lw=0.8, ls=':')
axes.set_xticks(
    range(len(rows)), [row['name'].removeprefix('backbone.') for row in rows], rotation=90
)
axes.set_ylabel('share kept')
show(figure, 'layers')

# %% [markdown]
# ## 7. The result is a stock checkpoint
#
# Same keys, same shapes, zeros in blocks. It loads into the model of the stock config, without
# mmsmart.

# %%
state = torch.load(WORK_DIR / 'pruned/pruned.pth', weights_only=True)['state_dict']
model = MODELS.build(config.model)
model.load_state_dict(state, strict=True)
weight = model.state_dict()['backbone.layer4.1.conv2.weight']
figure = Figure(figsize=(4, 4), layout='constrained')
axes = figure.subplots()
axes.imshow((weight[:, :, 1, 1] != 0).numpy(), cmap='Greys')
axes.set(title='backbone.layer4.1.conv2, centre: black is kept', xlabel='input', ylabel='output')
show(figure, 'blocks')
