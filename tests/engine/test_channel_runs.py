"""Runs that prune coupled channels: files that fit together, a shrunk model that scores alike.

The runs are those of `engine.runs`: a search from iteration 6 to 18 of 24.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from engine.runs import (
    assert_finished,
    assert_same_end,
    merged,
    pruned_weights,
    report,
    smart_config,
    stock_config,
    train,
)
from mmsmart.engine.config import Smart
from mmsmart.engine.model import ShrunkModel

CHANNELS = dict(block='channel', resource='macs', round_to=2, sparsity=0.5)
EMA = [dict(type='EMAHook', momentum=0.1, begin_iter=8)]


def channel_config(work_dir: Path, **changes) -> dict:
    return smart_config(work_dir, CHANNELS, **changes)


def trained(work_dir: Path, config: dict) -> Path:
    outcome = train(config)
    assert outcome.exitcode == 0 and outcome.error is None, outcome.log[-3000:]
    return work_dir


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Folder of an undisturbed run."""
    work_dir = tmp_path_factory.mktemp('channels')
    return trained(work_dir, channel_config(work_dir))


@pytest.fixture(scope='module')
def averaged_run(tmp_path_factory):
    """Folder of a run that is evaluated by its moving average."""
    work_dir = tmp_path_factory.mktemp('averaged')
    return trained(work_dir, channel_config(work_dir, custom_hooks=EMA))


def shrunk_config(folder: Path, work_dir: Path) -> dict:
    """A stock config whose model has the channels cut out."""
    config = stock_config(work_dir)
    config['model'] = dict(
        type='mmsmart.ShrunkModel',
        model=config['model'],
        structure=str(folder / 'structure.json'),
    )
    return config


def figures_of(config: dict, weights: Path) -> tuple[dict, list]:
    """Metrics by the stock runner of a model that is loaded strictly, and scores of two images."""
    importlib.import_module('mmsmart.engine')
    from mmengine.config import Config
    from mmengine.runner import Runner

    runner = Runner.from_cfg(Config(config))
    state = torch.load(weights, weights_only=True)['state_dict']
    runner.model.load_state_dict(state, strict=True)
    runner._has_loaded = True
    metrics = runner.test()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = runner.model.eval()(images, mode='tensor')
    size = sum(p.numel() for p in runner.model.parameters())
    return metrics, scores.tolist(), size


def macs_of(state: dict, image: int = 16) -> int:
    """MACs of the tests' ResNet-18 from the shapes of its weights alone."""
    edges = {'backbone.conv1': image // 2, 'head.fc': 1}
    for stage in range(4):
        edges[f'backbone.layer{stage + 1}'] = max(image // 4 >> stage, 1)
    total = 0
    for key, weight in state.items():
        if key.endswith('weight') and weight.ndim > 1:
            edge = next(edge for name, edge in edges.items() if key.startswith(name))
            total += weight.numel() * edge**2
    return total


@pytest.mark.parametrize('which', ['run', 'averaged_run'])
def test_figures_of_a_run_meet_the_budget_and_fit_its_files(which, request):
    folder = request.getfixturevalue(which)
    figures = report(folder)
    assert figures['resource'] == 'macs'
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']
    assert figures['kept'] == sum(row['macs_kept'] for row in figures['layers'])
    assert figures['achieved_sparsity'] >= 0.5
    for group in figures['groups']:
        count = group['channels_kept']
        assert count == group['channels_total'] or (count > 0 and count % 2 == 0)

    pruned = pruned_weights(folder)
    shrunk = torch.load(folder / 'shrunk.pth', weights_only=True)['state_dict']
    structure = json.loads((folder / 'structure.json').read_text())['layers']
    assert pruned.keys() == shrunk.keys()
    assert macs_of(pruned) == figures['dense']['macs']
    assert macs_of(shrunk) == figures['pruned']['macs']
    for row in figures['layers']:
        name = row['name']
        assert list(pruned[f'{name}.weight'].shape) == row['shape'] == structure[name]['shape']
        sizes = [shrunk[key].numel() for key in (f'{name}.weight', f'{name}.bias') if key in shrunk]
        assert sum(sizes) == row['params_kept']
        assert len(shrunk[f'{name}.weight']) == row['blocks_kept']
        out = structure[name]['out']
        if out is not None:  # what was cut out is zero in the file of full shape
            gone = sorted(set(range(row['blocks_total'])) - set(out))
            assert not pruned[f'{name}.weight'][gone].any()
    assert not math.isnan(figures['pruned']['accuracy/top1'])


@pytest.mark.parametrize('which', ['run', 'averaged_run'])
def test_the_shrunk_model_scores_what_the_pruned_one_does(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    full, small = (
        assert_finished(figures_of, config, folder / name, log=tmp_path / 'log.txt').value
        for config, name in (
            (stock_config(tmp_path / 'full'), 'pruned.pth'),
            (shrunk_config(folder, tmp_path / 'small'), 'shrunk.pth'),
        )
    )
    figures = report(folder)
    assert small[0]['accuracy/top1'] == full[0]['accuracy/top1']
    assert small[0]['accuracy/top1'] == figures['pruned']['accuracy/top1']
    torch.testing.assert_close(torch.tensor(small[1]), torch.tensor(full[1]), rtol=0, atol=1e-4)
    assert small[2] == figures['pruned']['params'] < figures['dense']['params'] == full[2]


def test_a_run_that_is_killed_in_its_search_resumes_to_the_same_end(run, tmp_path):
    config = channel_config(tmp_path)
    for kill, resume in ((15, False), (21, True)):
        outcome = train(config, kill_at=kill, resume=resume)
        assert outcome.exitcode == -9, outcome.log[-3000:]
    outcome = train(config, resume=True)
    assert outcome.exitcode == 0 and outcome.error is None, outcome.log[-3000:]
    assert_same_end(run, tmp_path)
    assert (run / 'structure.json').read_text() == (tmp_path / 'structure.json').read_text()
    ours, theirs = (
        torch.load(folder / 'shrunk.pth', weights_only=True)['state_dict']
        for folder in (run, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_blocks_meet_a_budget_of_macs(tmp_path):
    config = smart_config(tmp_path, dict(resource='macs'))
    trained(tmp_path, config)
    figures = report(tmp_path)
    assert figures['resource'] == 'macs'
    state = pruned_weights(tmp_path)
    assert macs_of(state) == figures['dense']['macs']
    kept = 0
    for row in figures['layers']:
        name = f'{row["name"]}.weight'
        each = macs_of({name: state[name]}) // state[name].numel()
        left = int((state[name] != 0).sum())
        assert (left, left * each) == (row['params_kept'], row['macs_kept'])
        kept += left * each
    assert kept == figures['kept'] <= figures['budget'] < kept + figures['next_block_cost']
    assert figures['budget'] == 0.25 * sum(row['macs_total'] for row in figures['layers'])


# Wrong structures and settings


def stock_model(run: Path) -> dict:
    return dict(stock_config(run)['model'], _scope_='mmpretrain')


def test_a_shrunk_checkpoint_without_its_structure_is_of_no_use(run):
    with pytest.raises(FileNotFoundError, match=r'needs the structure\.json that was written with'):
        ShrunkModel(stock_model(run), str(run / 'nothing.json'))


def test_the_structure_of_another_config_is_refused(run):
    wider = dict(backbone=dict(base_channels=16), head=dict(in_channels=128))
    model = merged(stock_model(run), wider)
    with pytest.raises(ValueError, match=r'structure.json: layers.*structure of another config'):
        ShrunkModel(model, str(run / 'structure.json'))


def test_a_structure_that_was_cut_short_is_refused(run, tmp_path):
    (tmp_path / 'structure.json').write_bytes((run / 'structure.json').read_bytes()[:-20])
    with pytest.raises(ValueError, match=r'structure\.json: not JSON, or cut short'):
        ShrunkModel(stock_model(run), str(tmp_path / 'structure.json'))


def test_a_shrunk_model_loads_no_dense_weights_of_its_backbone(run):
    """`init_cfg` names a checkpoint of other shapes, which need not even be there."""
    model = stock_model(run)
    model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='nowhere.pth')
    built = ShrunkModel(model, str(run / 'structure.json'))
    built.init_weights()
    state = torch.load(run / 'shrunk.pth', weights_only=True)['state_dict']
    built.load_state_dict(state, strict=True)
    weights = built.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ('smart', 'message'),
    [
        (dict(block='channels'), r"smart.block: got 'channels', allowed are .* and 'channel'"),
        (dict(round_to=2), r"smart.round_to: 2 rounds .* needs smart.block='channel'"),
        (dict(block='channel', resource='flops'), "smart.resource: got 'flops'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(smart, message):
    with pytest.raises(ValueError, match=message):
        Smart(**smart)


@pytest.mark.parametrize(
    ('smart', 'parts'),
    [
        (dict(round_to=0), ['round_to', '0', 'integer above 0']),
        (dict(sparsity=0.99), ['0.99 of the macs is too high', 'Lower the sparsity, `round_to`']),
        (dict(layers=[dict(pattern='backbone*', exclude=True)]), ['finds nothing to cut']),
        (dict(layers=[dict(pattern='head*', block=(1, 1, 1, 1))]), ['layers[0].block', 'channel']),
    ],
    ids=['round_to', 'sparsity', 'everything excluded', 'block of a rule'],
)
def test_a_wrong_setting_ends_the_run_before_it_trains(smart, parts, tmp_path):
    outcome = train(smart_config(tmp_path, merged(CHANNELS, smart)))
    assert outcome.error is not None and outcome.error.startswith('ValueError')
    assert all(part in outcome.error for part in parts), outcome.error
    assert not list(tmp_path.glob('*.pth'))
