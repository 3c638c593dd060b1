"""Every config of the repository can be built as far as is possible without data."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmsmart import install_masks
from mmsmart.engine.config import Smart, build
from mmsmart.engine.pruning_hook import SmartPruningHook
from mmsmart.engine.stock_tools import enable_inheritance

FOLDER = Path(__file__).parents[1] / 'configs'
BASES = sorted(FOLDER.glob('_base_/**/*.py'))
CONFIGS = sorted(set(FOLDER.rglob('*.py')) - set(BASES))
PRUNING = [path for path in CONFIGS if 'smart' in path.stem]


def named(path):
    return str(path.relative_to(FOLDER))


def read(path):
    enable_inheritance()
    config = Config.fromfile(path)
    init_default_scope(config.get('default_scope', 'mmengine'))
    return config


def model_of(config):
    """The model, without the pretrained weights that a recipe may want to download."""
    if config.default_scope == 'mmdet':
        pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    for part in (config.model, config.model.get('backbone', {})):
        part.pop('init_cfg', None)
        part.pop('pretrained', None)
    return MODELS.build(config.model)


def test_there_are_configs_to_test():
    assert BASES and PRUNING and len(CONFIGS) > len(PRUNING)


@pytest.mark.parametrize('path', CONFIGS, ids=named)
def test_config_builds_its_model(path):
    assert sum(p.numel() for p in model_of(read(path)).parameters()) > 0


@pytest.mark.parametrize('path', CONFIGS, ids=named)
def test_config_names_data_sets_that_exist(path):
    config = read(path)
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        for key in ('train_dataloader', 'val_dataloader'):
            assert registry.get(config[key].dataset.type) is not None


@pytest.mark.parametrize('path', PRUNING, ids=named)
def test_pruning_config_builds_its_plan(path):
    config = read(path)
    assert config.runner_type == 'mmsmart.SmartRunner'
    smart = build(Smart, 'smart', config.smart.to_dict())
    masks = install_masks(model_of(config), **smart.model_args())
    assert masks.budget >= float(masks.cost.min())
    hook = SmartPruningHook(**smart.hook_args())
    smart.optimizer_args()
    length = config.train_cfg.get('max_iters') or 100 * config.train_cfg.max_epochs
    begin, end = hook.stages.boundaries(length)
    assert 0 <= begin < end <= length


@pytest.mark.parametrize('path', PRUNING, ids=named)
def test_schedule_of_a_pruning_config_ends_with_the_run(path):
    """A recipe that was made shorter must not keep the learning rate of the longer one."""
    config = read(path)
    schedulers = config.param_scheduler
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        length = config.train_cfg.get('max_epochs') or config.train_cfg.max_iters
        assert scheduler.get('T_max', length) == length
        assert max([0, *scheduler.get('milestones', [])]) < length
