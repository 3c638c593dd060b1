"""YOLOv5: mmyolo where it is installed, a clear message where it is not.

mmyolo refuses the mmcv that these tests run with. What stands in for it here is a package of the
same build, with metadata, `.mim` and an optimiser constructor that makes the wrapper by itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest
from mmengine.config import Config

from engine.runs import REPO, apart, pruned_weights, report, run_tool, write_config
from mmsmart.engine.stock_tools import enable_inheritance, run_stock_tool

UPSTREAM = 'yolov5/yolov5_s-v61_syncbn_8xb16-300e_coco.py'
SHIPPED = REPO / 'configs/mmyolo/yolov5_s-v61_syncbn_8xb16-300e_coco_smart.py'

FILES = {
    'mmyolo-0.6.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: mmyolo\nVersion: 0.6.0',
    'mmyolo-0.6.0.dist-info/top_level.txt': 'mmyolo',
    'mmyolo/.mim/model-index.yml': 'Import:\n  - configs/yolov5/metafile.yml',
    'mmyolo/.mim/configs/yolov5/metafile.yml': f'Models:\n  - Config: configs/{UPSTREAM}',
    f'mmyolo/.mim/configs/{UPSTREAM}': """
default_scope = 'mmyolo'
model = dict(type='Detector')
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='Images'),
    sampler=dict(type='DefaultSampler', shuffle=True))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=5)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, batch_size_per_gpu=4),
    constructor='Constructor')
param_scheduler = None
load_from = None
""",
    'mmyolo/.mim/tools/train.py': """
import argparse
from mmengine.config import Config
from mmyolo.registry import RUNNERS

parser = argparse.ArgumentParser()
parser.add_argument('config')
parser.add_argument('--work-dir')
args = parser.parse_args()
config = Config.fromfile(args.config)
config.work_dir = args.work_dir
print("mmyolo's own tool")
RUNNERS.build(config).train()
""",
    'mmyolo/__init__.py': '',
    'mmyolo/registry.py': """
from mmengine import registry
from mmengine.registry import Registry

def child(name, parent):
    return Registry(name, parent=parent, locations=['mmyolo.parts'])

DATASETS = child('dataset', registry.DATASETS)
MODELS = child('model', registry.MODELS)
OPTIM_WRAPPER_CONSTRUCTORS = child('constructor', registry.OPTIM_WRAPPER_CONSTRUCTORS)
RUNNERS = child('runner', registry.RUNNERS)
""",
    'mmyolo/parts.py': """
import torch
from mmengine.model import BaseModel
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn
from mmyolo.registry import DATASETS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 8, 8, generator=generator), data_samples=index % 2)

@MODELS.register_module()
class Detector(BaseModel):
    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = nn.Conv2d(3, 32, 3)
        self.head = nn.Conv2d(32, 32, 3)

    def forward(self, inputs, data_samples, mode='tensor'):
        maps = self.head(self.backbone(torch.stack(inputs)).relu())
        return dict(loss=nn.functional.cross_entropy(
            maps.mean((2, 3)), torch.tensor(data_samples)))

@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class Constructor:
    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.wrapper = optim_wrapper_cfg
        self.optimizer = self.wrapper.pop('optimizer')
        self.optimizer.pop('batch_size_per_gpu')

    def __call__(self, model):
        groups = [dict(params=[p for p in model.parameters() if wanted(p.ndim)])
                  for wanted in ((1).__lt__, (1).__eq__)]
        optimizer = OPTIMIZERS.build({**self.optimizer, 'params': groups})
        return OPTIM_WRAPPERS.build(self.wrapper, default_args=dict(optimizer=optimizer))
""",
}


@pytest.fixture
def site_packages(tmp_path):
    """Folder with a package of mmyolo's name and build."""
    folder = tmp_path / 'site-packages'
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_the_shipped_config_inherits_mmyolos_recipe(site_packages, monkeypatch):
    monkeypatch.syspath_prepend(site_packages)
    enable_inheritance()
    config = Config.fromfile(SHIPPED)
    assert config.model == dict(type='Detector', _scope_='mmyolo')
    assert config.runner_type == 'mmsmart.SmartRunner'
    assert config.load_from is None


def run_with(site_packages, *arguments) -> None:
    sys.path.insert(0, str(site_packages))
    importlib.invalidate_caches()
    pruning_hook = importlib.import_module('mmsmart.engine.pruning_hook')
    pruning_hook.draw_report = lambda *_: None  # takes longer than the run
    run_tool(REPO / 'tools/train.py', *map(str, arguments))


def test_our_train_tool_runs_mmyolos(site_packages, tmp_path):
    work_dir = tmp_path / 'work'
    arguments = (SHIPPED, '--work-dir', work_dir)
    outcome = apart(run_with, site_packages, *arguments, log=tmp_path / 'log')
    assert outcome.error is None, outcome.log
    assert "mmyolo's own tool" in outcome.log
    figures, weights = report(work_dir), pruned_weights(work_dir)
    kept = sum(int((weights[f'{row["name"]}.weight'] != 0).sum()) for row in figures['layers'])
    assert {row['name'] for row in figures['layers']} == {'backbone', 'head'}
    assert kept == figures['kept'] <= figures['budget'] < kept + figures['next_block_cost']


@pytest.fixture
def bare(monkeypatch):
    """An environment where no toolbox is installed."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr('importlib.util.find_spec', lambda *_: None)
    monkeypatch.setattr('importlib.metadata.version', absent)


def refusal(monkeypatch, config_file) -> str:
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config_file)])
    # `pytest.raises` would keep MMEngine's frames, and in them a file that it leaves open.
    try:
        run_stock_tool('train.py')
    except SystemExit as stopped:
        return str(stopped)
    return 'not refused'


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg', 'mmyolo'])
def test_inheriting_from_a_missing_toolbox_is_refused_with_its_name(
    tmp_path, monkeypatch, bare, scope
):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{scope}::some/model.py'")
    message = refusal(monkeypatch, path)
    assert f'{path} needs {scope}, which is not installed' in message
    assert 'pip install' in message


def test_the_shipped_config_says_which_environment_mmyolo_needs(monkeypatch, bare):
    message = refusal(monkeypatch, SHIPPED)
    assert SHIPPED.name in message and 'needs mmyolo' in message
    assert 'mmcv>=2.0.0rc4,<2.1.0' in message and 'of its own' in message


def test_a_config_of_mmyolo_without_a_base_is_refused_too(tmp_path, monkeypatch, bare):
    path = write_config(tmp_path / 'config.py', dict(default_scope='mmyolo'))
    assert 'tools/train.py needs mmyolo' in refusal(monkeypatch, path)
