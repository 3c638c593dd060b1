"""Stock detectors under pruning: every hook, layer and tool that theirs brings along."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from engine.runs import (
    BASE,
    REPO,
    assert_finished,
    assert_on_budget,
    assert_same_end,
    nonzero_masks,
    pruned_weights,
    report,
    run_tool_mixed,
    run_tool_undrawn,
    scored,
    scored_by_stock_tool,
    stock_tool,
    write_config,
)
from engine.tiny_sets import (
    MASK_RCNN,
    RETINANET,
    SMART,
    YOLOX,
    mask_rcnn,
    retinanet,
    upstream_config,
    write_coco,
    yolox,
)

pytest.importorskip('mmcv._ext', reason='detectors need the compiled ops of mmcv')
pytest.importorskip('mmdet')


def configs(folder, upstream, changes):
    """Write a stock config and, on top of it, the pruning config."""
    name = Path(changes['work_dir']).name
    stock = write_config(folder / f'{name}.py', changes, [upstream_config('mmdet', upstream)])
    return stock, write_config(folder / f'{name}_smart.py', dict(smart=SMART), [stock, BASE])


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('coco') / 'tiny')


@pytest.fixture(scope='module')
def yolox_run(coco):
    """Stock config and folder of a YOLOX that mmdet's own tool has pruned."""
    folder = coco.parent
    stock, pruned = configs(folder, YOLOX, yolox(coco, folder / 'yolox'))
    assert_finished(
        run_tool_undrawn, stock_tool('train.py', 'mmdet'), pruned, log=folder / 'yolox.log'
    )
    return stock, pruned, folder / 'yolox'


def scalars(work_dir):
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_average_and_model_of_a_detector_have_the_same_zeros_from_the_search_on(yolox_run):
    *_, work_dir = yolox_run
    assert_on_budget(work_dir)
    rows = report(work_dir)['layers']
    wanted = nonzero_masks(pruned_weights(work_dir), rows)
    for epoch in (3, 4, 5):
        checkpoint = torch.load(work_dir / f'epoch_{epoch}.pth', weights_only=False)
        average = checkpoint['ema_state_dict']
        moving = {key.removeprefix('module.'): value for key, value in average.items()}
        for state in (checkpoint['state_dict'], moving):
            found = nonzero_masks(state, rows)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        different = [key for key in wanted if not torch.equal(*(
            state[f'{key}.weight'] for state in (checkpoint['state_dict'], moving)
        ))]  # fmt: skip
        assert len(different) == len(rows)


def test_mode_switch_and_sizes_of_yolox_go_on_in_the_fine_tuning(yolox_run):
    *_, work_dir = yolox_run
    lines = [line for line in scalars(work_dir) if 'loss' in line]
    assert ['temperature' in line for line in lines] == 3 * [False] + 6 * [True] + 6 * [False]
    assert ['loss_l1' in line for line in lines] == 9 * [False] + 6 * [True]
    assert len({line['input_height'] for line in lines if 'input_height' in line}) > 1


def test_our_tool_and_drawn_predictions_change_nothing_of_a_detector(tmp_path, yolox_run):
    _, pruned, work_dir = yolox_run
    assert_finished(
        run_tool_undrawn,
        REPO / 'tools/train.py',
        pruned,
        '--work-dir',
        tmp_path / 'ours',
        '--cfg-options',
        'default_hooks.visualization.draw=True',
        f'val_evaluator.1.out_file_path={tmp_path}/predictions.pkl',
        log=tmp_path / 'log',
    )
    assert_same_end(work_dir, tmp_path / 'ours')
    assert len(list((tmp_path / 'ours').glob('*/vis_data/vis_image/*.png'))) > 2


def predictions(path):
    return {
        sample['img_id']: sample['pred_instances'] for sample in pickle.loads(path.read_bytes())
    }


def assert_same_predictions(one, other):
    assert one.keys() == other.keys() and len(one) == 2
    for image, instances in one.items():
        assert len(instances['scores']) > 50
        for key, value in instances.items():
            assert torch.equal(value, other[image][key]), (image, key)


def test_stock_test_tool_predicts_what_the_last_validation_did(tmp_path, yolox_run):
    """To the last bit: what was averaged, scored and written is one and the same network."""
    stock, _, work_dir = yolox_run
    weights, dump = work_dir / 'pruned.pth', tmp_path / 'again.pkl'
    outcome = assert_finished(
        scored_by_stock_tool, 'mmdet', stock, weights, tmp_path / 'test', '--out', dump,
        log=tmp_path / 'log',
    )  # fmt: skip
    figures = report(work_dir)['pruned']
    assert outcome.value.items() <= figures.items()
    assert 'coco/AR@1000' in outcome.value  # too short a run to find much
    assert_same_predictions(predictions(work_dir / 'predictions.pkl'), predictions(dump))


def test_augmented_test_of_the_pruning_config_is_that_of_the_stock_config(tmp_path, yolox_run):
    stock, pruned, work_dir = yolox_run
    found = []
    for name, function, config in (
        ('stock', scored_by_stock_tool, stock),
        ('pruned', scored, pruned),
    ):
        dump = tmp_path / f'{name}.pkl'
        assert_finished(
            function, 'mmdet', config, work_dir / 'pruned.pth', tmp_path / name, '--tta',
            '--out', dump, log=tmp_path / 'log',
        )  # fmt: skip
        found.append(predictions(dump))
    assert_same_predictions(*found)
    single = predictions(work_dir / 'predictions.pkl')
    assert any(len(single[image]['scores']) != len(found[0][image]['scores']) for image in single)


@pytest.fixture(scope='module')
def retinanet_run(coco):
    folder = coco.parent
    _, pruned = configs(folder, RETINANET, retinanet(coco, folder / 'retinanet'))
    assert_finished(
        run_tool_undrawn, stock_tool('train.py', 'mmdet'), pruned, log=folder / 'retinanet.log'
    )
    return pruned, folder / 'retinanet'


def test_frozen_stages_and_their_statistics_stay_as_they_were(retinanet_run):
    _, work_dir = retinanet_run
    assert_on_budget(work_dir)
    frozen = ('backbone.conv1.', 'backbone.bn1.', 'backbone.layer1.')
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    first = torch.load(work_dir / 'iter_1.pth', weights_only=False)['state_dict']
    last = pruned_weights(work_dir)
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    still = {key for key in first if key.startswith(frozen) or key.endswith(statistics)}
    assert len(still) > 30
    assert set(first) - moved == still
    reasons = {row['name']: row['reason'] for row in report(work_dir)['excluded']}
    assert set(reasons) == {
        key.removesuffix('.weight')
        for key in first
        if key.startswith(frozen) and first[key].ndim == 4
    }
    assert set(reasons.values()) == {'frozen: the weight does not require a gradient'}


def test_a_head_shared_over_five_levels_is_counted_at_each(retinanet_run):
    _, work_dir = retinanet_run
    rows = {row['name']: row for row in report(work_dir)['layers']}
    levels = [8 * 8, 4 * 4, 2 * 2, 1, 1]  # strides 8 to 128 of a padded image of 64x64
    shared = [row for name, row in rows.items() if name.startswith('bbox_head.')]
    assert {'bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.1.conv', 'bbox_head.retina_cls'} <= {
        row['name'] for row in shared
    }
    for row in shared:
        assert row['macs_total'] == row['params_total'] * sum(levels)
        assert row['macs_kept'] == row['params_kept'] * sum(levels)
        assert 0 < row['params_kept'] <= row['params_total']
    assert any(row['params_kept'] < row['params_total'] for row in shared)


def test_checkpointed_segments_of_a_detector_prune_the_same_way(tmp_path, retinanet_run):
    pruned, work_dir = retinanet_run
    assert_finished(
        run_tool_undrawn, stock_tool('train.py', 'mmdet'), pruned, '--work-dir', tmp_path / 'work',
        '--cfg-options', 'model.backbone.with_cp=True', log=tmp_path / 'log',
    )  # fmt: skip
    # Gradients that meet at a layer are added in another order, here as in the stock run.
    assert report(work_dir) == {**report(tmp_path / 'work'), 'pruned': report(work_dir)['pruned']}
    first, second = pruned_weights(work_dir), pruned_weights(tmp_path / 'work')
    for key in first:
        assert torch.equal(first[key] == 0, second[key] == 0), key
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-7)


def test_amp_of_the_detection_tool_keeps_the_masks(tmp_path, retinanet_run):
    pruned, _ = retinanet_run
    work_dir = tmp_path / 'work'
    assert_finished(
        run_tool_mixed, stock_tool('train.py', 'mmdet'), pruned, '--work-dir', work_dir,
        log=tmp_path / 'log',
    )  # fmt: skip
    assert_on_budget(work_dir)
    checkpoint = torch.load(work_dir / 'iter_6.pth', weights_only=False)
    assert 'loss_scaler' in checkpoint['optimizer']
    assert checkpoint['optimizer']['smart']['masks']['state'] == 'hard'


def test_outputs_of_a_head_shared_over_five_levels_are_distilled(tmp_path, retinanet_run):
    pruned, work_dir = retinanet_run
    assert_finished(
        run_tool_undrawn, stock_tool('train.py', 'mmdet'), pruned, '--work-dir', tmp_path / 'work',
        '--cfg-options', 'smart.distillation.weight=0.1', 'smart.distillation.of=outputs',
        log=tmp_path / 'log',
    )  # fmt: skip
    distances = [x['distillation'] for x in scalars(tmp_path / 'work') if 'distillation' in x]
    assert distances and all(0 < distance < math.inf for distance in distances)
    assert pruned_weights(tmp_path / 'work').keys() == pruned_weights(work_dir).keys()
    state = torch.load(tmp_path / 'work' / 'iter_6.pth', weights_only=False)
    assert state['optimizer']['smart']['distillation'].keys() == state['state_dict'].keys()


def test_mask_rcnn_with_deformable_standardised_and_transposed_layers(tmp_path, coco):
    _, pruned = configs(tmp_path, MASK_RCNN, mask_rcnn(coco, tmp_path / 'work'))
    assert_finished(run_tool_undrawn, stock_tool('train.py', 'mmdet'), pruned, log=tmp_path / 'log')
    assert_on_budget(tmp_path / 'work')
    rows = {row['name']: row for row in report(tmp_path / 'work')['layers']}
    pruned_layers = [f'backbone.layer4.{index}.conv2' for index in range(3)]
    for name in (*pruned_layers, 'roi_head.mask_head.upsample'):
        assert 0 < rows[name]['params_kept'] <= rows[name]['params_total'], name
    assert any(rows[name]['params_kept'] < rows[name]['params_total'] for name in pruned_layers)
    reasons = {row['name']: row['reason'] for row in report(tmp_path / 'work')['excluded']}
    standardised = {name for name in reasons if name.startswith('neck.')}
    assert {reasons.pop(name) for name in standardised} == {
        'weight standardisation turns pruned zeros into other values'
    }
    assert len(standardised) == 8
    assert set(reasons.values()) == {'frozen: the weight does not require a gradient'}
    state = pruned_weights(tmp_path / 'work')
    assert not any(bool((state[f'{name}.weight'] == 0).any()) for name in standardised)
