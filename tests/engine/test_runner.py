"""From a stock config to a pruned checkpoint."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.runs import (
    BASE,
    REPO,
    apart,
    assert_same_end,
    pruned_weights,
    report,
    smart_config,
    stock_config,
    stock_tool,
    train,
    with_parts,
    write_config,
)

FILES = {'pruned.pth', 'pruning.json', 'pruning.png', 'last_checkpoint', 'epoch_4.pth'}


@pytest.mark.parametrize(
    'tool', [REPO / 'tools/train.py', stock_tool('train.py')], ids=['our tool', 'stock tool']
)
def test_one_base_file_prunes(tmp_path, finished_run, tool):
    finished, _ = finished_run
    config = smart_config(tmp_path / 'work')
    smart = config.pop('smart')
    del config['runner_type']
    write_config(tmp_path / 'stock.py', config)
    path = write_config(tmp_path / 'pruned.py', dict(smart=smart), [tmp_path / 'stock.py', BASE])
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', tool, path],
        env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / 'work').iterdir()} >= FILES
    assert_same_end(finished, tmp_path / 'work')


def test_parts_named_one_by_one_prune_the_same_way(tmp_path, finished_run):
    finished, notes = finished_run
    outcome = train(with_parts(smart_config(tmp_path)))
    assert outcome.error is None, outcome.log
    assert outcome.value == notes
    assert_same_end(finished, tmp_path)


def test_parts_that_the_config_names_are_kept_by_the_runner(tmp_path, finished_run):
    finished, _ = finished_run
    config = smart_config(tmp_path)
    config.update({**with_parts(config), 'smart': dict(sparsity=0.1)})
    config['runner_type'] = 'mmsmart.SmartRunner'
    assert train(config).error is None
    assert_same_end(finished, tmp_path)


@pytest.mark.parametrize('name', ['mmengine.OptimWrapper', 'mmsmart.SmartOptimWrapper'])
def test_optimiser_wrapper_may_be_named_with_its_scope(tmp_path, finished_run, name):
    finished, _ = finished_run
    config = smart_config(tmp_path, optim_wrapper=dict(type=name))
    assert train(config).error is None
    assert_same_end(finished, tmp_path)


def test_config_is_saved_as_it_was_written(finished_run):
    from mmengine.config import Config

    finished, _ = finished_run
    (path,) = finished.glob('*.py')
    saved = Config.fromfile(path)
    assert saved.model.type == 'ImageClassifier'
    assert saved.optim_wrapper.type == 'OptimWrapper'
    assert saved.smart.sparsity == 0.75


def test_all_three_stages_follow_each_other_in_one_run(finished_run):
    _, notes = finished_run
    assert [note['state'] for note in notes] == 6 * ['dense'] + 12 * ['soft'] + 6 * ['hard']


def test_pretraining_is_the_stock_run(tmp_path, finished_run):
    _, notes = finished_run
    stock = train(stock_config(tmp_path)).value
    assert [note['loss'] for note in stock[:6]] == [note['loss'] for note in notes[:6]]


def test_search_may_begin_from_a_dense_checkpoint(tmp_path):
    stock = train(stock_config(tmp_path / 'dense', train_cfg=dict(max_epochs=2)))
    assert stock.error is None, stock.log
    stages = dict(pretrain=0.0, search=0.5, finetune=0.5)
    config = smart_config(tmp_path / 'pruned', dict(stages=stages), train_cfg=dict(max_epochs=2))
    config['load_from'] = str(tmp_path / 'dense/epoch_2.pth')
    outcome = train(config)
    assert outcome.error is None, outcome.log
    assert [note['state'] for note in outcome.value] == 6 * ['soft'] + 6 * ['hard']
    dense = report(tmp_path / 'pruned')['dense']['accuracy/top1']
    assert f'accuracy/top1: {dense:.4f}' in stock.log.splitlines()[-1]


def test_kept_cost_meets_the_budget_from_below(finished_run):
    figures = report(finished_run[0])
    assert figures['kept'] <= figures['budget'] < figures['kept'] + figures['next_block_cost']


def test_figures_are_those_of_the_checkpoint(finished_run):
    """Counted anew: blocks cut by slicing, the budget by adding up."""
    work_dir, _ = finished_run
    figures, weights = report(work_dir), pruned_weights(work_dir)
    prunable = kept = 0
    for row in figures['layers']:
        weight = weights[f'{row["name"]}.weight']
        assert list(weight.shape) == row['shape']
        assert row['groups'] == 1
        alive = total = alive_weights = 0
        for o in range(0, weight.shape[0], row['block'][0]):
            for i in range(0, weight.shape[1], row['block'][1]):
                tile = weight[o : o + row['block'][0], i : i + row['block'][1]]
                for position in tile.flatten(2).unbind(2) if tile.ndim == 4 else [tile]:
                    total += 1
                    nonzero = int((position != 0).sum())
                    # Trained weights are not zero by chance: a block is whole or gone.
                    assert nonzero in (0, position.numel())
                    alive += nonzero > 0
                    alive_weights += nonzero
        assert row['block'][2:] in ([1, 1], [])
        assert (row['blocks_total'], row['blocks_kept']) == (total, alive)
        assert (row['params_total'], row['params_kept']) == (weight.numel(), alive_weights)
        prunable += weight.numel()
        kept += alive_weights
    assert figures['budget'] == prunable / 4
    assert figures['kept'] == kept
    assert figures['achieved_sparsity'] == pytest.approx(1 - kept / prunable, abs=1e-12)
    listed = {row['name'] for row in figures['layers']} | {
        row['name'] for row in figures['excluded']
    }
    assert listed == {
        key.removesuffix('.weight') for key, value in weights.items() if value.ndim > 1
    }
    trained = [
        value.numel() for key, value in weights.items() if key.endswith(('.weight', '.bias'))
    ]
    assert figures['dense']['params'] == sum(trained)
    assert figures['pruned']['params'] == sum(trained) - prunable + kept


def accuracy_without_mmsmart(weights: Path, config: dict) -> float:
    """Load strictly into the stock architecture and score the digits, with mmsmart out of reach."""
    import sys

    import numpy as np
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS, TRANSFORMS
    from sklearn.datasets import load_digits
    from torch.utils.data import default_collate

    init_default_scope('mmpretrain')
    sys.modules['mmsmart'] = None  # an import of it is an error from here on
    model = MODELS.build(config['model']).eval()
    checkpoint = torch.load(weights, weights_only=True)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    steps = [TRANSFORMS.build(step) for step in config['test_dataloader']['dataset']['pipeline']]
    digits = load_digits()
    right = 0
    for start in (0, 75):
        samples = []
        for index in range(4 * start, 4 * start + 300, 4):
            image = np.round(digits.images[index] * 255 / 16).astype(np.uint8)
            sample = dict(img=np.stack(3 * [image], axis=2), gt_label=int(digits.target[index]))
            for step in steps:
                sample = step(sample)
            samples.append(sample)
        batch = dict(
            inputs=default_collate([sample['inputs'] for sample in samples]),
            data_samples=[sample['data_samples'] for sample in samples],
        )
        with torch.no_grad():
            scored = model.val_step(batch)
        right += sum(int(sample.pred_label) == int(sample.gt_label) for sample in scored)
    loaded = [name for name, module in sys.modules.items() if module]
    assert not [name for name in loaded if name.partition('.')[0] == 'mmsmart']
    return 100 * right / 150


def test_checkpoint_scores_the_same_where_mmsmart_is_not_installed(finished_run):
    work_dir, _ = finished_run
    config = copy.deepcopy(stock_config(work_dir))
    outcome = apart(accuracy_without_mmsmart, work_dir / 'pruned.pth', config)
    assert outcome.error is None
    assert outcome.value == pytest.approx(report(work_dir)['pruned']['accuracy/top1'], abs=1e-4)
