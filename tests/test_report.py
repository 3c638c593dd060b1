"""Tests of mmsmart.report: figures that agree with the weights they describe."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from mmsmart import install_masks
from mmsmart.cost import count_positions
from mmsmart.drawing import draw_report
from mmsmart.report import pruning_report, save_report, summary_tables

# The contract of pruning.json; `groups` is what a reader needs to cut a grouped layer himself.
TOP = [
    'method', 'resource', 'target_sparsity', 'achieved_sparsity', 'budget', 'kept',
    'next_block_cost', 'budgets', 'dense', 'pruned', 'layers', 'excluded',
]  # fmt: skip
LAYER = [
    'name', 'shape', 'block', 'groups', 'blocks_total', 'blocks_kept', 'params_total',
    'params_kept', 'macs_total', 'macs_kept', 'at_floor',
]  # fmt: skip
BLOCK = (4, 3, 1, -1)
IMAGE = (1, 3, 12, 12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), groups=2)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.shared = nn.Conv2d(10, 10, 1)
        self.head = nn.Linear(10, 7)

    def forward(self, x):
        x = self.up(self.grouped(self.depthwise(self.norm(self.stem(x)))))
        return self.head(self.shared(self.shared(x)).mean((2, 3)))


@pytest.fixture(scope='module')
def case():
    torch.manual_seed(0)
    model = Net()
    positions = count_positions(model, lambda: model(torch.zeros(IMAGE)))
    masks = install_masks(model, 0.7, BLOCK, [dict(pattern='head', exclude=True)])
    masks.begin(torch.randn(masks.num_blocks), 0.1)
    masks.harden()
    report = pruning_report(
        model, masks, positions, 'smart', {'accuracy/top1': 92.5}, {'accuracy/top1': 91.25}
    )
    return model, masks, report


def count_blocks(weight, block, groups):
    """Blocks and how many of them are not zero, by slices: nothing of ours."""
    found = []
    for part in weight.chunk(groups):
        starts = [range(0, size, step) for size, step in zip(part.shape, block)]
        for corner in itertools.product(*starts):
            box = part[tuple(slice(i, i + step) for i, step in zip(corner, block))]
            found.append(bool((box != 0).any()))
    return len(found), sum(found)


def test_the_report_has_exactly_the_keys_of_the_contract(case):
    _, _, report = case
    assert list(report) == TOP
    assert all(list(row) == LAYER for row in report['layers'])
    assert all(list(item) == ['name', 'reason'] for item in report['excluded'])
    assert list(report['dense']) == list(report['pruned']) == ['params', 'macs', 'accuracy/top1']


def test_blocks_and_params_equal_a_recount_from_the_weights(case):
    model, _, report = case
    state = model.state_dict()
    assert [row['name'] for row in report['layers']] == ['stem', 'grouped', 'up', 'shared']
    for row in report['layers']:
        weight = state[f'{row["name"]}.weight']
        assert row['shape'] == list(weight.shape)
        assert (row['params_total'], row['params_kept']) == (
            weight.numel(),
            int(weight.count_nonzero()),
        )
        assert (row['blocks_total'], row['blocks_kept']) == count_blocks(
            weight, row['block'], row['groups']
        )
        assert 0 < row['blocks_kept'] < row['blocks_total']


def test_macs_equal_a_count_by_hand(case):
    """Images of 12: the stem halves them, the grouped layer takes two rows, `up` doubles both."""
    _, _, report = case
    positions = {'stem': 36, 'grouped': 4 * 6, 'up': 4 * 6, 'shared': 2 * 8 * 12}
    for row in report['layers']:
        assert row['macs_total'] == row['params_total'] * positions[row['name']]
        assert row['macs_kept'] == row['params_kept'] * positions[row['name']]
    dense = sum(row['macs_total'] for row in report['layers'])
    dense += 8 * 9 * 36 + 10 * 7  # depthwise and head, which stay dense
    assert report['dense']['macs'] == dense
    pruned = sum(row['macs_kept'] for row in report['layers']) + 8 * 9 * 36 + 10 * 7
    assert report['pruned']['macs'] == pruned


def test_params_are_those_of_the_whole_model(case):
    model, _, report = case
    total = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert report['dense']['params'] == total
    assert report['pruned']['params'] == total - zeros


def test_the_budget_is_met_and_no_pruned_block_would_have_fitted(case):
    _, _, report = case
    total = sum(row['params_total'] for row in report['layers'])
    kept = sum(row['params_kept'] for row in report['layers'])
    assert report['target_sparsity'] == 0.7
    assert report['budget'] == pytest.approx(0.3 * total, rel=1e-12)
    assert report['kept'] == kept <= report['budget'] < kept + report['next_block_cost']
    assert report['achieved_sparsity'] == pytest.approx(1 - kept / total, rel=1e-12)


def test_what_stays_dense_is_listed_with_its_reason(case):
    _, _, report = case
    reasons = {item['name']: item['reason'] for item in report['excluded']}
    assert list(reasons) == ['depthwise', 'head']
    assert reasons['depthwise'].startswith('depthwise')
    assert 'rule' in reasons['head']


def test_the_file_holds_the_report(case, tmp_path):
    _, _, report = case
    save_report(report, tmp_path / 'pruning.json')
    text = (tmp_path / 'pruning.json').read_text()
    assert json.loads(text) == report
    assert text.endswith('}\n')
    assert [path.name for path in tmp_path.iterdir()] == ['pruning.json']


def test_metrics_out_of_numpy_or_torch_can_be_written(case, tmp_path):
    model, masks, _ = case
    metrics = {'acc': torch.tensor(1.5), 'per_class': torch.tensor([1.0, 2.0]).numpy()}
    report = pruning_report(model, masks, {}, 'smart', {}, metrics)
    save_report(report, tmp_path / 'pruning.json')
    written = json.loads((tmp_path / 'pruning.json').read_text())
    assert written['pruned']['acc'] == 1.5
    assert written['pruned']['per_class'] == [1.0, 2.0]


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_metric_that_is_no_number_leaves_the_file_valid_json(case, tmp_path, bad):
    """JSON knows no NaN; mmdet reports it for a class without images."""
    model, masks, _ = case
    report = pruning_report(model, masks, {}, 'smart', {'mAP': bad}, {'mAP': 0.5})
    save_report(report, tmp_path / 'pruning.json')

    def refuse(name):
        raise AssertionError(f'{name} is not JSON')

    text = (tmp_path / 'pruning.json').read_text()
    assert json.loads(text, parse_constant=refuse)['dense']['mAP'] is None


# Picture and tables


def test_the_picture_is_a_png_of_a_size_to_look_at(case, tmp_path):
    _, masks, report = case
    draw_report(report, masks, tmp_path / 'pruning.png')
    assert [path.name for path in tmp_path.iterdir()] == ['pruning.png']
    data = (tmp_path / 'pruning.png').read_bytes()
    assert data.startswith(b'\x89PNG\r\n\x1a\n')
    width, height = (int.from_bytes(data[at : at + 4], 'big') for at in (16, 20))
    assert 800 <= width <= 4000
    assert 400 <= height <= 4000
    assert len(data) > 10_000


@pytest.mark.parametrize('depth', [1, 40])
def test_a_network_of_any_depth_can_be_drawn(depth, tmp_path):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
    masks = install_masks(model, 0.5, (2, 2))
    masks.begin(torch.randn(masks.num_blocks), 0.1)
    masks.harden()
    draw_report(pruning_report(model, masks, {}, 'smart', {}, {}), masks, tmp_path / 'a.png')
    assert (tmp_path / 'a.png').stat().st_size > 10_000


def rendered(report):
    console = Console(width=140, record=True, file=io.StringIO())
    for table in summary_tables(report):
        console.print(table)
    return console.export_text()


def test_the_tables_show_the_figures(case):
    _, _, report = case
    text = rendered(report)
    row = next(row for row in report['layers'] if row['name'] == 'grouped')
    assert f'{row["blocks_kept"]}/{row["blocks_total"]}' in text
    assert '12x4x3x1' in text
    assert f'{report["dense"]["params"]:,}' in text
    assert f'{report["achieved_sparsity"]:.2%}' in text
    assert '-1.25' in text  # of the metric


def test_the_tables_stand_without_positions_or_metrics(case):
    """A model that could not be run has no MACs to compare."""
    model, masks, _ = case
    text = rendered(pruning_report(model, masks, {}, 'smart', {}, {}))
    assert 'params' in text
