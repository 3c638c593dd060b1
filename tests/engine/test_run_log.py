"""What a run left in its folder is read as it was, whether it has finished or not."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.runs import pruned_weights, report
from mmsmart import install_masks
from mmsmart.engine.run_log import note_start, read_run
from mmsmart.engine.run_log.masks import Checkpoint, importances, with_masks
from mmsmart.html_report.run import Timeline

LOG = '2026/11/23 10:45:{second:02d} - mmengine - INFO - {text}\n'


@pytest.fixture(scope='module')
def finished(finished_run):
    return read_run(finished_run[0])


@pytest.fixture
def searching(finished_run, tmp_path):
    """The same run as it was at iteration 15, in the middle of its search and of a line."""
    return cut_at(15, finished_run[0], tmp_path / 'searching')


def cut_at(iteration, work_dir, folder):
    shutil.copytree(work_dir, folder)
    for file in (*folder.glob('pruned.pth'), *folder.glob('pruning.*')):
        file.unlink()
    for epoch in range(1, 5):
        if epoch * 6 > iteration:
            (folder / f'epoch_{epoch}.pth').unlink()
    (scalars,) = folder.glob('*/vis_data/scalars.json')
    lines = scalars.read_text().splitlines(keepends=True)
    after = [i for i, line in enumerate(lines) if json.loads(line).get('iter') == iteration + 1]
    scalars.write_text(''.join(lines[: after[0]]) + '{"loss": 1.2')
    return folder


def write_start(folder, name, rows, resumed=0):
    """What MMEngine leaves of one start, in short."""
    (folder / name / 'vis_data').mkdir(parents=True)
    text = '' if not resumed else LOG.format(second=1, text=f'resumed epoch: 2, iter: {resumed}')
    text += LOG.format(second=2, text='Epoch(train) [1][ 5/10]  lr: 1.0e-02')
    (folder / name / f'{name}.log').write_text(text)
    config = "train_cfg = dict(by_epoch=True, max_epochs=6)\nsmart = dict(method='smart')\n"
    (folder / name / 'vis_data/config.py').write_text(config)
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / name / 'vis_data/scalars.json').write_text(lines)


def row(iteration, loss=1.0):
    return {'loss': loss, 'epoch': 1, 'iter': iteration, 'step': iteration}


def test_a_finished_run_is_read_whole(finished, finished_run):
    figures = report(finished_run[0])
    assert finished.finished and finished.stage == 'finished'
    assert finished.timeline == Timeline(6, 18, 24)
    assert finished.iteration == 24
    assert finished.series('loss')[0] == list(range(1, 25))
    assert finished.series('temperature')[0] == list(range(7, 19))
    assert finished.scores('accuracy/top1')[0] == [6, 12, 18, 24]
    assert finished.dense == figures['dense'] and finished.pruned == figures['pruned']
    assert finished.budgets[0]['kept'] == figures['kept']
    assert finished.excluded == [(item['name'], item['reason']) for item in figures['excluded']]
    assert 'ResNet' in finished.config
    assert finished.starts[0].versions['torch'] == torch.__version__
    assert not set(finished.missing) - {'provenance'}


def test_block_maps_of_a_finished_run_are_those_of_its_weights(finished, finished_run):
    state, rows = pruned_weights(finished_run[0]), report(finished_run[0])['layers']
    assert [layer.name for layer in finished.layers] == [row['name'] for row in rows]
    for layer, figures in zip(finished.layers, rows):
        assert layer.density == figures['params_kept'] / figures['params_total']
        weight = state[f'{layer.name}.weight']
        out, in_ = figures['block'][:2]
        for i, j in ((0, 0), (layer.image.shape[0] - 1, layer.image.shape[1] - 1)):
            corner = weight[i * out : (i + 1) * out, j * in_ : (j + 1) * in_]
            kept = (corner != 0).flatten(0, 1).any(0).float().mean()
            assert layer.image[i, j] == pytest.approx(float(kept))


def test_importances_of_a_finished_run_are_split_at_the_threshold(finished, finished_run):
    kept = sum(row['blocks_kept'] for row in report(finished_run[0])['layers'])
    at = finished.importances
    assert at.temperature is None and int(at.kept.sum()) == kept
    assert (at.distance > 0)[at.kept].mean() > 0.99 and (at.distance < 0)[~at.kept].mean() > 0.99


def test_a_run_in_its_search_is_read_as_far_as_it_has_come(searching):
    run = read_run(searching)
    assert not run.finished and run.stage == 'search'
    assert (run.iteration, run.timeline) == (15, Timeline(6, 18, 24))
    assert run.scores('accuracy/top1')[0] == [6, 12]
    assert run.dense['accuracy/top1'] == run.scores('accuracy/top1')[1][0]
    assert run.masks_from.startswith('epoch_2.pth, at iteration 12')
    budget = run.budgets[0]['budget']
    assert sum(layer.params_kept for layer in run.layers) == pytest.approx(budget, rel=1e-4)
    assert run.importances.temperature == pytest.approx(run.series('temperature')[1][5], rel=0.5)
    assert set(run.missing) >= {'metrics'}


def test_before_the_search_there_is_no_mask_and_it_is_said(finished_run, tmp_path):
    run = read_run(cut_at(6, finished_run[0], tmp_path / 'dense'))
    assert run.stage == 'search' and run.importances is None  # its next iteration
    assert {'density', 'masks', 'importance', 'decisions', 'metrics'} <= set(run.missing)
    assert all(layer.density is None for layer in run.layers)


def test_a_checkpoint_that_is_still_being_written_is_passed_over(searching):
    whole = (searching / 'epoch_2.pth').read_bytes()
    (searching / 'epoch_3.pth').write_bytes(whole[: len(whole) // 2])
    assert read_run(searching).masks_from.startswith('epoch_2.pth')


def test_a_report_of_an_earlier_training_in_the_same_folder_is_not_taken(searching, finished_run):
    shutil.copy(finished_run[0] / 'pruning.json', searching)
    os.utime(searching / 'pruning.json', (0, 0))
    assert not read_run(searching).finished


def test_a_checkpoint_of_an_earlier_training_in_the_same_folder_is_not_taken(searching):
    (log,) = searching.glob('*/vis_data')
    log.parent.rename(searching / '99990101_000000')
    run = read_run(searching)
    assert run.iteration == 15 and run.importances is None and run.masks_from == ''


def test_what_a_resumption_did_once_more_counts_once(tmp_path):
    write_start(tmp_path, '20261123_104500', [row(5), row(10), {'acc': 0.5, 'step': 1}, row(15, 9)])
    resumed = [row(15), row(20), {'acc': 0.7, 'step': 2}]
    write_start(tmp_path, '20261123_110000', resumed, resumed=10)
    run = read_run(tmp_path)
    assert run.series('loss') == ([5, 10, 15, 20], [1.0] * 4)
    assert run.scores('acc') == ([10, 20], [0.5, 0.7])
    assert [start.iteration for start in run.starts] == [0, 10]
    assert run.timeline == Timeline(0, 36, 60)  # the default shares, of 6 epochs of 10


def test_a_new_training_in_an_old_folder_stands_alone(tmp_path):
    write_start(tmp_path, '20261123_104500', [row(5, 9), row(10, 9)])
    write_start(tmp_path, '20261123_110000', [row(5)])
    run = read_run(tmp_path)
    assert run.series('loss') == ([5], [1.0])
    assert len(run.starts) == 1


def test_a_validation_in_the_middle_of_an_epoch_is_the_one_before_the_search(tmp_path):
    rows = [row(5), row(10), {'acc': 0.5, 'step': 1}, row(15), {'acc': 0.6, 'step': 1}, row(20)]
    write_start(tmp_path, '20261123_104500', rows)
    text = 'mmsmart: search over iterations 17 to 36: 9 blocks'
    with (tmp_path / '20261123_104500/20261123_104500.log').open('a') as log:
        log.write(LOG.format(second=3, text=text))
    assert read_run(tmp_path).scores('acc') == ([10, 17], [0.5, 0.6])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='not the folder of a training run'):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match='not the folder of a training run'):
        read_run(tmp_path / 'nowhere')


@pytest.mark.parametrize('layer', [nn.Linear(16, 8), nn.Conv2d(8, 8, 3)], ids=['matrix', 'kernel'])
def test_rows_of_n_of_m_have_no_threshold_in_common(layer):
    model = nn.Sequential(layer)
    masks = install_masks(model, block='2:4', sparsity=0.5)
    masks.begin(torch.randn(masks.num_blocks), temperature=0.3)
    checkpoint = Checkpoint(masks=masks.state_dict(), weights=model.state_dict())
    assert importances(checkpoint) is None and with_masks([], checkpoint) == []
    masks.harden()
    hard = Checkpoint(masks=masks.state_dict(), weights=model.state_dict())
    assert importances(hard).kept.sum() == masks.num_blocks / 2 and with_masks([], hard) == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Conv2d(12, 16, 1, groups=2))
        self.head = nn.Linear(16, 10)


@pytest.mark.parametrize(
    'settings',
    [
        dict(sparsity=0.6),
        dict(sparsity=dict(backbone=0.7, head=0.4)),
        dict(sparsity=0.6, layers=[dict(pattern='head', min_density=0.7)]),
        dict(sparsity=dict(backbone=0.5, head=0.4), layers=[dict(pattern='*.0', block='2:4')]),
    ],
    ids=['one budget', 'parts', 'a floor that holds', 'N:M beside blocks'],
)
def test_soft_masks_are_read_from_importance_and_thresholds(settings):
    torch.manual_seed(0)
    model = Net()
    masks = install_masks(model, block=(4, 4, 1, 1), **settings)
    importance = torch.randn(masks.num_blocks)
    importance[-model.head.weight.numel() // 16 :] -= 2  # so that a floor of the head holds it
    masks.begin(importance, temperature=0.3)
    checkpoint = Checkpoint(masks=masks.state_dict(), weights=model.state_dict())
    parts = masks.mask().split([layer.num_blocks for layer in masks.layers])
    truth = {
        layer.name: (layer.map_of(part), float((layer.sizes() * part).sum()))
        for layer, part in zip(masks.layers, parts)
    }
    read = with_masks([], checkpoint)
    assert {layer.name for layer in read} == {x.name for x in masks.layers if x.n_of_m is None}
    for layer in read:
        image, kept = truth[layer.name]
        assert layer.params_kept == pytest.approx(kept, rel=1e-4)
        assert torch.allclose(torch.from_numpy(layer.image), image, atol=1e-5)
    at = importances(checkpoint)
    assert len(at.distance) == sum(x.num_blocks for x in masks.layers if x.n_of_m is None)
    assert ((at.distance > 0) == at.kept).all()


def test_the_start_notes_what_only_the_running_process_knows(tmp_path):
    write_start(tmp_path, '20261123_104500', [row(5)])
    model = Net()
    masks = install_masks(model, dict(head=0.5, backbone=0.5), (4, 4, 1, 1))
    runner = SimpleNamespace(
        log_dir=str(tmp_path / '20261123_104500'), iter=0, max_iters=60, model=model
    )
    note_start(runner, masks, {'backbone.0': 100}, begin=20, end=50)
    run = read_run(tmp_path)
    assert run.timeline == Timeline(20, 50, 60)
    assert 'python' in run.starts[0].command or 'pytest' in run.starts[0].command
    assert {'mmsmart', 'python', 'torch', 'mmengine'} <= set(run.starts[0].versions)
    assert [layer.name for layer in run.layers] == ['backbone.0', 'backbone.1', 'head']
    assert run.layers[0].macs_total == 100 * 4 * 12 * 9
    assert {budget['part'] for budget in run.budgets} == {'head', 'backbone'}
    assert run.excluded == [] and 'provenance' not in run.missing
