"""Every config of the repository can be built as far as is possible without data."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmsmart import masks_of
from mmsmart.engine.config import Smart, Stages, build
from mmsmart.engine.model import SmartModel
from mmsmart.engine.pruning_hook import SmartPruningHook
from mmsmart.engine.stock_tools import enable_inheritance

FOLDER = Path(__file__).parents[1] / 'configs'
BASES = sorted(FOLDER.glob('_base_/**/*.py'))
CONFIGS = sorted(set(FOLDER.rglob('*.py')) - set(BASES))
PRUNING = [path for path in CONFIGS if 'smart' in path.stem]
DENSE = sorted(set(CONFIGS) - set(PRUNING))
# Prunes a model of upstream from the checkpoint that upstream gives for it.
UPSTREAMS = [path for path in PRUNING if re.search('in1k|coco_smart|cityscapes|ade20k', path.stem)]


def named(path):
    return str(path.relative_to(FOLDER))


def mim(scope):
    """Folder with a toolbox's configs, tools and model index."""
    spec = find_spec(scope)
    if spec is None:
        pytest.skip(f'{scope} is not installed')
    return Path(spec.origin).parent / '.mim'


def upstream(path):
    """Toolbox and config that a pruning config inherits from."""
    return re.search(r"'(mm\w+)::(.+?\.py)'", path.read_text()).groups()


def index_entry(scope, base):
    """What upstream's model index says of a config, its checkpoint among it."""
    (file,) = (mim(scope) / 'configs' / base).parent.glob('metafile.y*ml')
    # mmyolo lists the twin of a config that loads its images faster.
    return next(
        entry
        for entry in load(file)['Models']
        if entry.get('Config', '').replace('_fast_', '_') == f'configs/{base}'
    )


def read(path):
    mim(path.parent.name)  # skips where it is missing
    enable_inheritance()
    config = Config.fromfile(path)
    init_default_scope(config.get('default_scope', 'mmengine'))
    if config.default_scope == 'mmdet':
        pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    return config


def model_of(config):
    """The model with its weights at random: only `init_weights` loads what a recipe starts from."""
    config.model.pop('pretrained', None)  # mmseg's old spelling of `init_cfg` warns
    return MODELS.build(config.model)


@pytest.fixture(scope='module', autouse=True)
def no_network():
    def refuse(*_):
        raise AssertionError('a config must not reach for the network')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('socket.socket.connect', refuse)
        yield


@pytest.fixture(scope='module', params=PRUNING, ids=named)
def planned(request):
    """Config, model and masks; each model is built once."""
    config = read(request.param)
    model = model_of(config)
    smart = build(Smart, 'smart', config.smart.to_dict())
    return config, model, masks_of(SmartModel(model, shape=(64, 64), **smart.model_args()))


def test_there_are_configs_to_test():
    assert BASES and PRUNING and DENSE
    assert {path.parent.name for path in PRUNING} == {'mmpretrain', 'mmdet', 'mmseg', 'mmyolo'}
    assert {path.parent.name for path in UPSTREAMS} == {'mmpretrain', 'mmdet', 'mmseg', 'mmyolo'}


@pytest.mark.parametrize('path', DENSE, ids=named)
def test_dense_config_builds_its_model(path):
    assert sum(p.numel() for p in model_of(read(path)).parameters()) > 0


@pytest.mark.parametrize('path', CONFIGS, ids=named)
def test_config_names_data_sets_that_exist(path):
    config = read(path)
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        for key in ('train_dataloader', 'val_dataloader'):
            assert registry.get(config[key].dataset.type) is not None


def test_pruning_config_builds_its_plan(planned):
    config, _, masks = planned
    assert config.runner_type == 'mmsmart.SmartRunner'
    assert 0 < masks.budget < masks.total_cost
    smart = build(Smart, 'smart', config.smart.to_dict())
    hook = SmartPruningHook(**smart.hook_args())
    smart.optimizer_args()
    length = config.train_cfg.get('max_iters') or 100 * config.train_cfg.max_epochs
    begin, end = hook.stages.boundaries(length)
    assert 0 <= begin < end <= length


def test_pruning_config_leaves_the_checkpoint_to_the_user(planned):
    config, *_ = planned
    assert config.get('load_from') is None


def test_optimiser_of_a_pruning_config_can_take_masks(planned):
    config, *_ = planned
    assert config.optim_wrapper.get('type', 'OptimWrapper') in {'OptimWrapper', 'AmpOptimWrapper'}


def test_every_weight_is_pruned_or_left_dense_for_a_reason(planned):
    _, model, masks = planned
    pruned = {layer.name for layer in masks.layers}
    dense = {item.name for item in masks.excluded if item.reason}
    weights = {name.removesuffix('.weight') for name, p in model.named_parameters() if p.ndim >= 2}
    assert weights == pruned | dense and not pruned & dense


def test_most_of_a_shipped_model_is_prunable(planned):
    _, model, masks = planned
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # SegFormer has 83 %: nn.MultiheadAttention keeps queries, keys and values in one parameter.
    assert sum(layer.weight.numel() for layer in masks.layers) > 0.8 * trained


def test_frozen_layers_are_listed_as_frozen(planned):
    config, model, masks = planned
    listed = {item.name for item in masks.excluded if item.reason.startswith('frozen')}
    frozen = {
        name.removesuffix('.weight')
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and not weight.requires_grad
    }
    assert listed == frozen
    if config.model.backbone.get('frozen_stages', -1) >= 1:
        assert 'backbone.conv1' in listed
        assert any(name.startswith('backbone.layer1.') for name in listed)
        assert not any(name.startswith('backbone.layer2.') for name in listed)


@pytest.mark.parametrize('path', UPSTREAMS, ids=named)
def test_a_config_names_the_checkpoint_of_upstreams_index(path):
    scope, base = upstream(path)
    (named_here,) = re.findall(r'^# .*?([\w.-]+\.pth)$', path.read_text(), flags=re.M)
    assert index_entry(scope, base)['Weights'].endswith(f'/{named_here}')
    assert path.stem == f'{Path(base).stem}_smart'


def assert_schedule_ends_with_the_run(config):
    loop, schedulers = config.train_cfg, config.param_scheduler
    length = loop.get('max_epochs') or loop.max_iters
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    # Of several, those that count something else, as a warm-up of some iterations, end before.
    counting = [s for s in schedulers if s.get('by_epoch', True) == ('max_epochs' in loop)]
    assert max(s.get('end', length) for s in counting) == length
    for scheduler in counting:
        period = scheduler.get('T_max', length)
        # One of several schedulers, which has its own begin and end, may also be shorter.
        assert period == length or ('begin' in scheduler and period < length)
        assert max([0, *scheduler.get('milestones', [])]) < length


@pytest.mark.parametrize('path', PRUNING, ids=named)
def test_schedule_of_a_pruning_config_ends_with_the_run(path):
    """A recipe that was made shorter must not keep the learning rate of the longer one."""
    config = read(path)
    if config.param_scheduler is None:  # mmyolo's has a hook for it
        assert config.default_hooks.param_scheduler.max_epochs == config.train_cfg.max_epochs
    else:
        assert_schedule_ends_with_the_run(config)


def assert_augmentation_stays_during_the_search(config):
    epochs = config.train_cfg.get('max_epochs', 0)
    stages = build(Stages, 'smart.stages', config.smart.stages.to_dict())
    for hook in config.get('custom_hooks') or []:
        if 'switch_epoch' in hook or 'num_last_epochs' in hook:
            change = hook.get('switch_epoch') or epochs - hook['num_last_epochs']
            begin, end = stages.boundaries(epochs)
            assert change <= begin or end <= change < epochs


@pytest.mark.parametrize('path', PRUNING, ids=named)
def test_augmentation_of_a_pruning_config_stays_during_the_search(path):
    """Or the search would end on other images than it began with."""
    assert_augmentation_stays_during_the_search(read(path))
