"""Tests of what a comparison refuses before anything runs, and of what it lets through."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from engine.desks import SUITE
from mmsmart.compare import jobs_of, suite_of
from mmsmart.engine.compare import expect_valid

CONFIG = """
runner_type = 'mmsmart.SmartRunner'
param_scheduler = [dict(type='MultiStepLR', milestones=[1])]
smart = dict(
    sparsity=0.5,
    latency=dict(layers=[dict(pattern='*', block=1.0)]),
    stages=dict(pretrain=0.2, search=0.4, finetune=0.4),
    temperature=dict(start=1.0, end=0.001),
    importance=dict(init='zero', scale=0.5),
)
"""


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """A function that checks a suite of one method, of a task with the config above."""
    monkeypatch.chdir(tmp_path)
    Path('net.py').write_text(CONFIG)

    def check(options=None, method=None, **changes):
        task = {'config': 'net.py', 'metric': 'mIoU', 'options': options or {}}
        grid = {'tasks': {'net': task}, 'methods': {'own': {'method': 'smart', **(method or {})}}}
        expect_valid(jobs_of(suite_of({**SUITE, **grid, **changes}, 'trial')))

    return check


def test_checking_tells_nothing_of_the_environment(checked, monkeypatch):
    told = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'handle', lambda record: told.append(record.getMessage()))
    monkeypatch.setenv('WIDTH', '3')
    Path('net.py').write_text(CONFIG + "width = '{{$WIDTH:4}}'\n")
    Config.fromfile('net.py')
    assert len(told) == 1 and 'Using env variable `WIDTH`' in told[0]
    checked()
    assert len(told) == 1
    Config.fromfile('net.py')
    assert len(told) == 2


@pytest.mark.parametrize(
    'method',
    [
        {},
        {'stages': {'_delete_': True, 'search': 0.5, 'finetune': 0.5}},
        {'temperature': {'_delete_': True, 'start': 0.1}},
        {'importance': {'_delete_': True, 'lr': 0.1}},
        {'temperature': {'start': 0.005}},
        {'resource': 'latency'},
        {'resource': 'latency', 'latency': '{{$NO_SUCH_VARIABLE:table.yaml}}'},
        {'layers': [{'pattern': 'head', 'block': '4x4'}]},
    ],
)
def test_settings_that_are_right_beside_those_of_the_config_pass(checked, method):
    Path('table.yaml').write_text("layers: [{pattern: '*', block: 2.0}]")
    checked(method=method)
    with pytest.raises(ValueError, match="unknown key 'sparsty'"):  # it was looked at
        checked(method={**method, 'sparsty': 0.5})


@pytest.mark.parametrize(
    ('method', 'message'),
    [
        ({'method': 'smrt'}, "smart.method: got 'smrt', allowed are"),
        ({'temprature': {}}, "smart: unknown key 'temprature'"),
        ({'stages': {'search': 2}}, 'smart.stages: .* with sum 2.6'),
        # Right with the defaults, and not with the pretrain stage of the config.
        ({'stages': {'search': 0.5, 'finetune': 0.5}}, 'smart.stages: .* with sum 1.2'),
        ({'temperature': {'end': 2.0}}, 'smart.temperature: '),
        ({'importance': {'lr': 0}}, 'smart.importance.lr: expected a number above 0, got 0'),
        ({'distillation': 'on'}, "smart.distillation.weight: .*'on'"),
        ({'layers': [{'name': 'head'}]}, r"layers\[0\]: expected `pattern` .* keys \['name'\]"),
    ],
)
def test_settings_that_a_run_would_refuse_are_refused_by_task_method_and_block(
    checked, method, message
):
    with pytest.raises(ValueError, match=f'^tasks.net, methods.own, block 8x8: {message}'):
        checked(method=method)


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        ('2:4', 'block 2:4: sparsity: 0.7 contradicts the block 2:4, .* write 0.5'),
        ('channel', r"block channel: layers\[0\].block: can't be set beside block='channel'"),
        ('8', "block 8: smart.block: got '8', allowed are"),
    ],
)
def test_blocks_that_contradict_what_else_is_asked_for_are_refused(checked, block, message):
    rules = [{'pattern': 'head', 'block': '4x4'}] if block == 'channel' else []
    with pytest.raises(ValueError, match=f'^tasks.net, methods.own, {message}'):
        checked({'smart.layers': rules}, blocks=[block])


def test_a_rule_of_another_block_leaves_the_sparsity_to_be_met_beside_two_of_four(checked):
    rule = {'pattern': 'head', 'block': '4x4'}
    checked({'smart.layers': [rule]}, blocks=['2:4'])
    with pytest.raises(ValueError, match='contradicts the block 2:4'):
        checked(blocks=['2:4'])


def test_an_option_that_can_not_be_merged_into_the_config_is_refused(checked):
    with pytest.raises(ValueError, match=r'^tasks.net, .*param_scheduler.*_delete_=True'):
        checked({'param_scheduler.milestones': [2]})
    dense = {'config': 'net.py', 'metric': 'mIoU', 'dense': 'net.py'}
    task = {**dense, 'dense_options': {'param_scheduler.milestones': [2]}}
    with pytest.raises(ValueError, match=r'^tasks.net.dense_options: param_scheduler'):
        checked(tasks={'net': task})


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ("_base_ = ['nowhere.py']", r'FileNotFoundError: .*nowhere.py'),
        ("_base_ = ['mmyolo::no_such_config.py']", 'mmyolo'),
        ('smart = dict(', 'SyntaxError'),
    ],
)
def test_a_config_that_can_not_be_read_is_named_with_the_reason(checked, text, message):
    Path('net.py').write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ResourceWarning)  # MMEngine leaves a file open
        with pytest.raises(ValueError, match=rf'tasks.net.config: net.py can not .*: .*{message}'):
            checked()
        gc.collect()


def test_a_config_is_read_once_for_all_of_its_runs(checked, monkeypatch):
    read, files = Config.fromfile, []

    def counted(file, *args, **kwargs):
        files.append(file)
        return read(file, *args, **kwargs)

    monkeypatch.setattr(Config, 'fromfile', counted)
    checked(seeds=list(range(300)))
    assert len(files) == 1


def test_only_what_will_run_is_checked(desk):
    desk.write(methods={'smart': {}, 'broken': {'method': 'smart', 'stages': {'search': 2}}})
    for arguments in ([], ['--dry-run']):
        with pytest.raises(ValueError, match=r'methods.broken, block 8x8: smart.stages'):
            desk.run(*arguments)
    assert desk.calls() == []
    assert desk.run('--dry-run', '--only', 'net/smart/*')
    assert not desk.run('--table-only')
