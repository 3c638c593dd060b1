"""A wrong setting is refused before the first iteration, by a message that names the cure."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from engine.runs import (
    BASE,
    apart,
    assert_nothing_written,
    merged,
    smart_config,
    stock_config,
    train,
    train_here,
    with_parts,
    write_config,
)
from mmsmart.engine.config import Importance, Smart, Stages, Temperature, build


def without_smart(config):
    del config['smart']
    return config


def with_changes(config, **changes):
    return merged(config, changes)


# Name: the wrong `smart`, and what the message has to say.
WRONG = {
    'sparsity of one': (dict(sparsity=1.0), ['sparsity', '1.0', '[0, 1)']),
    'negative sparsity': (dict(sparsity=-0.1), ['sparsity', '-0.1', '[0, 1)']),
    'sparsity in percent': (dict(sparsity=80), ['sparsity', '80', '[0, 1)']),
    'sparsity as a word': (dict(sparsity='high'), ['sparsity', "'high'"]),
    'sparsity that leaves no block': (dict(sparsity=0.99999), ['sparsity', 'smallest block']),
    'block with a zero': (dict(block=(4, 0, 1, 1)), ['block', 'at least 1', '-1']),
    'block above every layer': (dict(block=(4096, 4, 1, 1)), ['block', '4096', 'larger']),
    'block as a word': (dict(block='channels'), ['smart.block', "'channels'", "'channel'"]),
    'pattern without a match': (
        dict(layers=[dict(pattern='bakbone', exclude=True)]),
        ['layers', "'bakbone'", 'backbone'],
    ),
    'everything excluded': (
        dict(layers=[dict(pattern='*', exclude=True)]),
        ['no prunable layer', 'layers'],
    ),
    'stages above one': (
        dict(stages=dict(pretrain=0.5, search=0.5, finetune=0.5)),
        ['smart.stages', 'add up to 1', '1.5'],
    ),
    'negative stage': (
        dict(stages=dict(pretrain=-0.5, search=1.0, finetune=0.5)),
        ['smart.stages', '[0, 1]'],
    ),
    'stage as a word': (dict(stages=dict(pretrain='long')), ['smart.stages', 'numbers']),
    'no search': (
        dict(stages=dict(pretrain=0.5, search=0.0, finetune=0.5)),
        ['smart.stages', 'search is 0'],
    ),
    'search of no iteration': (
        dict(stages=dict(pretrain=0.5, search=0.01, finetune=0.49)),
        ['smart.stages', 'less than one iteration', '24'],
    ),
    'temperature of zero': (dict(temperature=dict(end=0.0)), ['temperature', '0']),
    'rising temperature': (
        dict(temperature=dict(start=0.1, end=1.0)),
        ['temperature', '0.1', '1'],
    ),
    'unknown shape': (dict(temperature=dict(shape='step')), ["'step'", 'geometric']),
    'unknown key': (dict(sparsty=0.5), ["'sparsty'", "Did you mean 'sparsity'?"]),
    'unknown key of a part': (
        dict(temperature=dict(begin=1.0)),
        ['smart.temperature', "'begin'", "['start', 'end', 'shape']"],
    ),
    'unknown key of a rule': (dict(layers=[dict(name='head')]), ['layers[0]', 'pattern']),
    'rule of a block beside channels': (
        dict(block='channel', layers=[dict(pattern='head', block='8x8')]),
        ['layers[0].block', "block='channel'"],
    ),
    'unknown method': (dict(method='agb'), ['smart.method', "'agb'", "Did you mean 'agp'?"]),
    'unknown setting of the method': (
        dict(method='agp', method_cfg=dict(intervall=3)),
        ['smart.method_cfg', "'intervall'", "Did you mean 'interval'?"],
    ),
    'setting of another method': (
        dict(method_cfg=dict(interval=3)),
        ['smart.method_cfg', "'interval'", "['curvature', 'scope', 'tied']"],
    ),
    'odd number of phases': (
        dict(method='acdc', method_cfg=dict(phases=3)),
        ['smart.method_cfg.phases', '3', 'even'],
    ),
    'distillation of no weight': (dict(distillation=0), ['smart.distillation.weight', '0']),
    'stages as a tuple': (
        dict(stages=(0.2, 0.5, 0.3)),
        ['smart.stages', '(0.2, 0.5, 0.3)', "['pretrain', 'search', 'finetune']"],
    ),
    'temperature as a number': (dict(temperature=0.5), ['smart.temperature', '0.5', "'start'"]),
    'importance as a number': (dict(importance=0.01), ['smart.importance', '0.01', "'lr'"]),
    'settings of the method as a number': (dict(method_cfg=3), ['smart.method_cfg', '3', 'dict']),
    'distillation of a list': (
        dict(distillation=dict(of=['outputs'])),
        ['smart.distillation.of', "['outputs']"],
    ),
    'infinite distillation': (dict(distillation=math.inf), ['smart.distillation.weight', 'inf']),
    'distillation as a word': (dict(distillation='on'), ['smart.distillation.weight', "'on'"]),
    'distillation of something else': (
        dict(distillation=dict(of='logits')),
        ['smart.distillation.of', "'logits'", "('outputs', 'features')"],
    ),
    'unknown key of the distillation': (
        dict(distillation=dict(wait=1.0)),
        ['smart.distillation', "'wait'", "Did you mean 'weight'?"],
    ),
    'negative recalibration': (dict(recalibrate=-1), ['smart.recalibrate', '-1', '0 or more']),
    'recalibration as a truth value': (dict(recalibrate=True), ['smart.recalibrate', 'True']),
    'unknown resource': (dict(resource='joules'), ['smart.resource', "'joules'", "'params'"]),
    'negative curvature': (
        dict(importance=dict(curvature=-1)), ['smart.importance.curvature', '-1', 'at least 0']
    ),
    'unknown start': (dict(importance=dict(init='ones')), ['smart.importance.init', "'ones'"]),
    'first importance without a scale': (
        dict(importance=dict(scale=0)), ['smart.importance.scale', '0', "init='zero'"]
    ),
    'no calibration batch': (dict(importance=dict(batches=0)), ['smart.importance.batches', '0']),
    'importance that does not learn': (dict(importance=dict(lr=0.0)), ['smart.importance.lr']),
    'importance with weight decay': (
        dict(importance=dict(optimizer=dict(type='SGD', weight_decay=0.1))),
        ['smart.importance.optimizer', 'weight decay'],
    ),
    'importance without an optimiser': (
        dict(importance=dict(optimizer='Adam')),
        ['smart.importance.optimizer', "dict(type='Adam')"],
    ),
}  # fmt: skip

# Name: how the whole config is wrong, and what the message has to say.
WRONG_RUNS = {
    'runner without smart': (without_smart, ['smart', '_base_/smart.py']),
    'optimiser wrapper of apex': (
        lambda config: with_changes(config, optim_wrapper=dict(type='ApexOptimWrapper')),
        ['optim_wrapper.type', "'ApexOptimWrapper'", "'OptimWrapper'"],
    ),
    'parts with the stock wrapper': (
        lambda config: with_changes(with_parts(config), optim_wrapper=dict(type='OptimWrapper')),
        ['optim_wrapper.type', "'mmsmart.SmartOptimWrapper'"],
    ),
    'parts with the stock mixed-precision wrapper': (
        lambda config: with_changes(with_parts(config), optim_wrapper=dict(type='AmpOptimWrapper')),
        ['optim_wrapper.type', "'mmsmart.SmartAmpOptimWrapper'", '--amp'],
    ),
    'parts without a masked model': (
        lambda config: {**with_parts(config), 'model': config['model']},
        ['model', 'mmsmart.SmartModel'],
    ),
}


def errors_of(configs):
    """What training with each of these configs is refused with, all in one process."""
    import importlib

    amp = importlib.import_module('mmengine.optim.optimizer.amp_optimizer_wrapper')
    amp.is_cuda_available = lambda: True
    errors = {}
    for name, config in configs.items():
        config = {**config, 'experiment_name': name}
        config['custom_hooks'] = [*config['custom_hooks'], dict(type='Witness')]
        try:
            errors[name] = f'trained for {len(train_here(config))} iterations'
        except Exception as error:
            errors[name] = f'{type(error).__name__}: {error}'
    return errors


@pytest.fixture(scope='module')
def refusals(tmp_path_factory):
    folder = tmp_path_factory.mktemp('refused')
    configs = {
        name: smart_config(folder / name.replace(' ', '_')) for name in (*WRONG, *WRONG_RUNS)
    }
    for name, (smart, _) in WRONG.items():
        configs[name]['smart'] = merged(configs[name]['smart'], smart)
    for name, (change, _) in WRONG_RUNS.items():
        configs[name] = change(copy.deepcopy(configs[name]))
    outcome = apart(errors_of, configs, log=folder / 'log.txt')
    assert outcome.error is None, outcome.log
    return SimpleNamespace(errors=outcome.value, folder=folder, log=outcome.log)


@pytest.mark.parametrize('name', [*WRONG, *WRONG_RUNS])
def test_wrong_setting_is_refused_before_training(refusals, name):
    _, words = (WRONG | WRONG_RUNS)[name]
    error = refusals.errors[name]
    assert error.startswith('ValueError: '), error
    assert not [word for word in words if word not in error], error
    assert_nothing_written(refusals.folder)
    assert 'Epoch(train)' not in refusals.log


def test_settings_wrong_without_a_model_are_refused_before_a_folder_is_made(refusals):
    made = {path.name.replace('_', ' ') for path in refusals.folder.iterdir()}
    needs_the_model = {
        'sparsity that leaves no block', 'block with a zero', 'block above every layer',
        'block as a word', 'pattern without a match', 'everything excluded',
        'search of no iteration',
        *WRONG_RUNS,
    } - {'runner without smart'}  # fmt: skip
    assert made - {'log.txt'} <= needs_the_model


@pytest.fixture(scope='module')
def dense_checkpoint(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('dense')
    assert train(stock_config(work_dir, train_cfg=dict(max_epochs=1))).error is None
    return work_dir / 'epoch_1.pth'


def refused_start(config: dict) -> str:
    outcome = train(config)
    assert outcome.error is not None and outcome.error.startswith('ValueError: '), outcome.log
    assert 'Epoch(train)' not in outcome.log
    assert_nothing_written(Path(config['work_dir']))
    return outcome.error


SEARCH_AT_ONCE = dict(stages=dict(pretrain=0.0, search=0.5, finetune=0.5))


def test_checkpoint_of_another_width_is_refused(tmp_path, dense_checkpoint):
    width = dict(
        backbone=dict(stem_channels=16, base_channels=16), head=dict(in_channels=128)
    )  # fmt: skip
    config = smart_config(tmp_path, model=width, load_from=str(dense_checkpoint))
    error = refused_start(config)
    assert 'load_from' in error and '(16, 3, 7, 7)' in error and '(8, 3, 7, 7)' in error


def test_checkpoint_with_missing_layers_is_refused_where_nothing_trains_them(
    tmp_path, dense_checkpoint
):
    deeper = dict(backbone=dict(depth=34))
    config = smart_config(tmp_path, SEARCH_AT_ONCE, model=deeper, load_from=str(dense_checkpoint))
    error = refused_start(config)
    assert 'load_from' in error and 'missing' in error and 'smart.stages.pretrain' in error


def test_checkpoint_with_missing_layers_is_a_start_for_pretraining(tmp_path, dense_checkpoint):
    deeper = dict(backbone=dict(depth=34))
    config = smart_config(
        tmp_path, model=deeper, load_from=str(dense_checkpoint), train_cfg=dict(max_epochs=2)
    )
    outcome = train(config)
    assert outcome.error is None, outcome.log


FEWER_CLASSES = dict(head=dict(num_classes=7), data_preprocessor=dict(num_classes=7))


@pytest.mark.parametrize(
    'smart',
    [
        pytest.param(SEARCH_AT_ONCE, id='head pruned'),
        pytest.param(
            {**SEARCH_AT_ONCE, 'layers': [dict(pattern='head', exclude=True)]}, id='head left dense'
        ),
    ],
)
def test_checkpoint_with_other_classes_is_refused_where_nothing_trains_the_head(
    tmp_path, dense_checkpoint, smart
):
    config = smart_config(tmp_path, smart, model=FEWER_CLASSES, load_from=str(dense_checkpoint))
    error = refused_start(config)
    assert 'head.fc.weight is (7, 64) in the model and (10, 64) in the checkpoint' in error
    assert 'head.fc.bias is (7,) in the model and (10,) in the checkpoint' in error
    assert 'load_from' in error and 'smart.stages.pretrain' in error


def test_checkpoint_with_other_classes_is_a_start_for_pretraining(tmp_path, dense_checkpoint):
    more_classes = dict(head=dict(num_classes=12), data_preprocessor=dict(num_classes=12))
    outcome = train(
        smart_config(
            tmp_path,
            model=more_classes,
            load_from=str(dense_checkpoint),
            train_cfg=dict(max_epochs=2),
        )
    )
    assert outcome.error is None, outcome.log
    assert 'load_from: head.fc.weight, head.fc.bias of the model start untrained' in outcome.log
    state = torch.load(tmp_path / 'pruned.pth', weights_only=True)['state_dict']
    assert state['head.fc.weight'].shape == (12, 64)


@pytest.mark.parametrize(
    ('smart', 'words'),
    [
        pytest.param(dict(sparsity=0.5), ['budget', '`sparsity`'], id='sparsity'),
        pytest.param(dict(block=(2, 4, 1, 1)), ['layers', '`block`'], id='block'),
        pytest.param(SEARCH_AT_ONCE, ['smart.stages', '6 to 18', '6 to 9'], id='stages'),
        pytest.param(dict(method='agp'), ['method', 'Smart(', 'AGP('], id='method'),
    ],
)
def test_resume_under_another_plan_is_refused(tmp_path, smart, words):
    config = smart_config(tmp_path, dict(), train_cfg=dict(max_epochs=4))
    assert train(config, kill_at=15).exitcode == -9
    if smart is SEARCH_AT_ONCE:  # what was soft at iteration 12 is due to be hard
        smart = dict(stages=dict(pretrain=0.25, search=0.125, finetune=0.625))
    outcome = train(merged(config, dict(smart=smart)), resume=True)
    assert outcome.error is not None and outcome.error.startswith('ValueError: '), outcome.log
    assert not [word for word in words if word not in outcome.error], outcome.error
    assert_nothing_written(tmp_path)


def test_base_file_states_the_defaults_of_the_code():
    stated = Config.fromfile(BASE).smart.to_dict()
    parts = dict(stages=Stages, temperature=Temperature, importance=Importance)
    for key, value in dataclasses.asdict(Smart()).items():
        if key in parts:
            assert stated.pop(key) == dataclasses.asdict(parts[key]())
        elif value is None:
            assert key not in stated, 'a dict could not be given for it'
        else:
            written = stated.pop(key)
            assert written == (list(value) if isinstance(written, list) else value), key
    assert not stated


@pytest.mark.parametrize(
    'smart',
    [
        dict(sparsity=dict(params=0.6, macs=0.5)),
        dict(sparsity=dict(backbone=0.5, neck=dict(macs=0.1))),
        dict(max_drop=dict(drop=0.5, trials=3)),
        dict(distillation=dict(weight=0.5)),
        dict(sparsity=0.5, resource='latency', latency=dict(layers=[dict(pattern='*', block=1)])),
    ],
    ids=['resources', 'parts', 'max_drop', 'distillation', 'latency'],
)
def test_what_may_be_a_dict_may_be_one_beside_the_base_file(smart, tmp_path):
    path = write_config(tmp_path / 'mine.py', dict(smart=smart), bases=[BASE])
    built = build(Smart, 'smart', Config.fromfile(path).smart.to_dict())
    assert all(getattr(built, key) == value for key, value in smart.items())


def test_defaults_of_the_hook_and_the_wrapper_are_those_of_the_base_file():
    from mmsmart.engine import SmartOptimWrapper, SmartPruningHook
    from mmsmart.engine.config import ImportanceOptimizer, ImportanceStart

    hook = SmartPruningHook()
    assert (hook.method, hook.stages, hook.start) == ('smart', Stages(), ImportanceStart())
    assert hook.schedule == Temperature().schedule()
    assert (hook.distillation, hook.recalibrate) == (None, Smart().recalibrate)
    weight = torch.nn.Parameter(torch.zeros(1))
    wrapper = SmartOptimWrapper(optimizer=torch.optim.SGD([weight], lr=1))
    assert wrapper._importance_settings == ImportanceOptimizer()


def test_unknown_key_without_a_likeness_lists_what_is_allowed():
    with pytest.raises(ValueError, match=r"smart\.stages: unknown key 'warmup'; allowed are") as e:
        build(Stages, 'smart.stages', dict(warmup=0.5))
    assert 'Did you mean' not in str(e.value)


def test_stage_borders_fall_on_iterations():
    assert Stages(0.25, 0.5, 0.25).boundaries(24) == (6, 18)
    assert Stages(0.0, 1.0, 0.0).boundaries(7) == (0, 7)
    assert Stages(1 / 3, 1 / 3, 1 / 3).boundaries(10) == (3, 7)
