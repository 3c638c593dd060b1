"""Runs under budgets by part and resource, latency tables and N of M; and what they refuse.

The runs are those of `engine.runs`: a search from iteration 6 to 18 of 24.
"""

from __future__ import annotations

import pytest

from engine.runs import pruned_weights, report, smart_config, train

TABLE = """
unit: us
layers:
  - {pattern: '*', block: 2, fixed: 30}
  - {pattern: backbone.layer4, curve: [[0, 10], [0.2, 400], [1, 900]]}
"""
BLOCK = (4, 4, 1, 1)


def trained(work_dir, smart, **changes):
    outcome = train(smart_config(work_dir, smart, **changes))
    assert outcome.exitcode == 0 and outcome.error is None, outcome.log[-3000:]
    return outcome


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """Folder and log of a run with budgets by part, of two resources in one of them."""
    work_dir = tmp_path_factory.mktemp('parts')
    wanted = {'backbone.layer4': dict(params=0.8, macs=0.6), 'backbone.layer3': 0.5}
    return work_dir, trained(work_dir, dict(sparsity=wanted)).log


def test_a_run_meets_the_budget_of_each_part(parts):
    work_dir, _ = parts
    figures = report(work_dir)
    assert [(row['part'], row['resource']) for row in figures['budgets']] == [
        ('backbone.layer4', 'params'), ('backbone.layer4', 'macs'), ('backbone.layer3', 'params'),
    ]  # fmt: skip
    state = pruned_weights(work_dir)
    met = {}
    for row in figures['budgets']:
        layers = [x for x in figures['layers'] if x['name'].startswith(row['part'])]
        assert row['kept'] == sum(x[f'{row["resource"]}_kept'] for x in layers) <= row['budget']
        is_met = row['kept'] + row['next_block_cost'] > row['budget']
        met.setdefault(row['part'], []).append(is_met)
        for layer in layers:
            kept = int(state[f'{layer["name"]}.weight'].count_nonzero())
            assert kept == layer['params_kept'] > 0
    assert all(any(of_part) for of_part in met.values())
    outside = [x['name'] for x in figures['excluded'] if 'in no part' in x['reason']]
    assert 'head.fc' in outside and 'backbone.conv1' in outside


def test_the_log_says_what_each_part_may_keep(parts):
    assert 'weights of backbone.layer4 (sparsity 0.8)' in parts[1]
    assert 'MACs of backbone.layer4 (sparsity 0.6)' in parts[1]
    assert 'weights of backbone.layer3 (sparsity 0.5)' in parts[1]


def test_a_run_with_parts_resumes_to_the_same_end(parts, tmp_path):
    wanted = {'backbone.layer4': dict(params=0.8, macs=0.6), 'backbone.layer3': 0.5}
    config = smart_config(tmp_path, dict(sparsity=wanted))
    assert train(config, kill_at=14).exitcode < 0
    assert train(config, resume=True).error is None
    mine, theirs = pruned_weights(parts[0]), pruned_weights(tmp_path)
    assert all(bool((mine[key] == theirs[key]).all()) for key in mine)


def test_a_latency_table_steers_a_run_and_all_three_figures_are_reported(tmp_path):
    table = tmp_path / 'npu.yaml'
    table.write_text(TABLE)
    trained(tmp_path, dict(sparsity=0.5, resource='latency', latency=str(table)))
    figures = report(tmp_path)
    (budget,) = figures['budgets']
    assert (budget['resource'], budget['unit']) == ('latency', 'us')
    assert budget['kept'] <= budget['budget'] < budget['kept'] + budget['next_block_cost']
    assert {'params', 'macs', 'latency'} <= set(figures['pruned'])
    expected = 0.0
    for row in figures['layers']:
        share = row['params_kept'] / row['params_total']
        if row['name'].startswith('backbone.layer4'):
            value = 10 + 1950 * share if share <= 0.2 else 400 + 625 * (share - 0.2)
        else:
            value = 30 + 2 * row['blocks_kept']
        assert row['latency_kept'] == pytest.approx(value, rel=1e-9)
        expected += value
    assert budget['kept'] == pytest.approx(expected, rel=1e-9)
    assert figures['pruned']['latency'] == pytest.approx(expected, rel=1e-9)


def test_two_of_four_runs_without_a_sparsity_of_its_own(tmp_path):
    trained(tmp_path, dict(block='2:4', sparsity=None))
    figures = report(tmp_path)
    assert figures['achieved_sparsity'] == pytest.approx(0.5, abs=0.01)  # three input channels
    state = pruned_weights(tmp_path)
    for row in figures['layers']:
        assert row['block'] == '2:4'
        weight = state[f'{row["name"]}.weight'].movedim(1, -1).flatten(0, -2)
        for group in weight.split(4, dim=1):
            assert bool((group.count_nonzero(1) <= 2).all())


@pytest.mark.parametrize(
    ('smart', 'parts'),
    [
        (dict(sparsity={}), ['sparsity', 'got []']),
        (dict(sparsity=dict(backbone=0.5, macs=0.5)), ['sparsity', 'all resources']),
        (dict(sparsity=dict(backbone=1.0)), ["sparsity['backbone']", '1.0 is outside [0, 1)']),
        (dict(sparsity=dict(necks=0.5)), ["the part 'necks' holds no prunable layer"]),
        (
            dict(sparsity={'backbone': 0.5, 'backbone.layer4': 0.5}),
            ["'backbone.layer4.0.conv1' belongs to the parts"],
        ),
        (dict(resource='latency'), ['smart.latency', 'table']),
        (dict(resource='latency', latency='none.yaml'), ["no file 'none.yaml'"]),
        (
            dict(resource='latency', latency=dict(layers=[dict(pattern='head', block=1)])),
            ["no entry of the table means the layer 'backbone.conv1'", "pattern '*'"],
        ),
        (dict(latency=dict(layers=[dict(pattern='head')])), ['layers[0]', '`block` or `curve`']),
        (
            dict(layers=[dict(pattern='backbone', min_density=0.6)]),
            ['0.75 leaves a budget of', 'the floors of its', '`min_density`'],
        ),
        (dict(layers=[dict(pattern='*', min_density=2)]), ['layers[0].min_density', '2']),
        (dict(block='2:4'), ['0.75 contradicts the block 2:4', '0.5']),
        (dict(block='4:2'), ['smart.block', "'4:2'", 'N below M']),
        (dict(block='large'), ['smart.block', "'large'", "'16x8'"]),
        (
            dict(block='channel', sparsity=dict(backbone=0.5)),
            ['budgets by part (backbone)', "block='channel'"],
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else '',
)
def test_what_can_not_be_met_is_refused_before_the_first_iteration(smart, parts, tmp_path):
    config = smart_config(tmp_path)
    config['smart'].update(smart)
    outcome = train(config)
    assert outcome.error is not None and outcome.value is None
    assert all(part in outcome.error for part in parts), outcome.error
    assert not list(tmp_path.rglob('*.pth')) and 'Epoch(train)' not in outcome.log
