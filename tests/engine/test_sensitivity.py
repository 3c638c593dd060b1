"""Tests of mmsmart.engine.sensitivity and tools/sensitivity.py."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.runs import (
    REPO,
    apart,
    assert_finished,
    run_tool,
    stock_config,
    train,
    write_config,
)
from engine.tiny_sets import (
    DEEPLAB,
    MASK_RCNN,
    deeplab,
    mask_rcnn,
    upstream_config,
    write_coco,
    write_segmentation,
)

TOOL = REPO / 'tools/sensitivity.py'
FEW = ('--images', '20', '--densities', '0.5', '0.1', '--sparsities', '0.5', '0.9')
SMART = dict(block=(4, 4, 1, 1), importance=dict(batches=1))


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Config and checkpoint of a trained classifier."""
    folder = tmp_path_factory.mktemp('digits')
    outcome = train(stock_config(folder / 'work', train_cfg=dict(max_epochs=2)))
    assert outcome.error is None, outcome.log
    config = write_config(folder / 'config.py', {**stock_config(folder / 'work'), 'smart': SMART})
    return config, folder / 'work/epoch_2.pth'


@pytest.fixture(scope='module')
def measured(digits):
    """Folder of a finished measurement, and what the tool printed."""
    config, checkpoint = digits
    out = config.parent / 'out'
    log = config.parent / 'log'
    outcome = assert_finished(run_tool, TOOL, config, checkpoint, '--out', out, *FEW, log=log)
    return out, outcome.log


def report_of(out):
    return json.loads((out / 'sensitivity.json').read_text())


def test_every_layer_and_both_resources_are_measured_and_a_smart_is_proposed(measured):
    out, log = measured
    report = report_of(out)
    assert report['images'] == 20 and report['data'] == 'validation'
    assert len(report['layers']) == 21
    for layer in report['layers']:
        assert [point['density'] for point in layer['losses']] == [0.5, 0.1]
        assert all(point['kept'] <= point['density'] for point in layer['losses'])
        assert layer['name'] in log.replace('\n', '').replace(' ', '')
    for resource in ('params', 'macs'):
        for point in report['network'][resource]['plain']:
            assert point['kept'] <= 1 - point['sparsity'] + 1e-9
        assert f"resource='{resource}'" in log
    assert (out / 'sensitivity.png').read_bytes().startswith(b'\x89PNG')


def test_the_proposed_text_prunes_as_it_is(measured, digits):
    from mmsmart.engine.config import Smart

    _, log = measured
    text = 'smart = dict(' + log.split('smart = dict(')[1].partition('\n)')[0] + '\n)'
    names: dict = {}
    exec(text, names)
    assert list(Smart(**names['smart']).block) == list(SMART['block'])


def test_a_killed_measurement_goes_on_with_the_rows_that_are_there(tmp_path, measured, digits):
    """One row is made up, so that it can't be measured again unseen."""
    out, _ = measured
    shutil.copytree(out, tmp_path / 'out')
    file = tmp_path / 'out/sensitivity.jsonl'
    lines = file.read_text().splitlines(keepends=True)
    made_up = {**json.loads(lines[4]), 'loss': 1234.5}
    file.write_text(''.join([*lines[:4], json.dumps(made_up) + '\n', lines[5][:20]]))
    arguments = (*digits, '--out', tmp_path / 'out', '--resume', *FEW)
    assert_finished(run_tool, TOOL, *arguments, log=tmp_path / 'log')
    after = [json.loads(line) for line in file.read_text().splitlines()]
    before = [json.loads(line) for line in lines]
    layers = [row for row in before if row.get('what') in ('dense', 'layer')]
    again = [row for row in after if row.get('what') in ('dense', 'layer')]
    assert again == [made_up if row == before[4] else row for row in layers]
    plain = [row for row in before if row.get('rules') == []]
    assert [row for row in after if row.get('rules') == []] == plain


def test_rows_of_another_checkpoint_are_refused(tmp_path, measured, digits):
    out, _ = measured
    config, checkpoint = digits
    arguments = (config, checkpoint.with_name('epoch_1.pth'), '--out', out, '--resume', *FEW)
    outcome = apart(run_tool, TOOL, *arguments, log=tmp_path / 'log')
    assert 'was measured with another checkpoint' in outcome.error


def settings_of(config, checkpoint, changes):
    from mmsmart.engine.export import read_config
    from mmsmart.engine.sensitivity import TrainedNet

    return TrainedNet(read_config(config, changes), checkpoint, images=20).settings


def test_rows_of_other_latencies_and_other_data_are_other_rows(tmp_path, digits):
    table = tmp_path / 'table.yaml'
    smart = {'smart.latency': str(table)}
    learnt = {'smart.importance': dict(init='activation'), 'smart.latency': str(table)}
    less = {**learnt, 'train_dataloader.dataset.indices': 64}
    seen = []
    for latency, changes in ((1.0, smart), (2.0, smart), (2.0, learnt), (2.0, less)):
        table.write_text(f'layers: [{{pattern: "*", block: {latency}}}]\n')
        outcome = apart(settings_of, *digits, changes, log=tmp_path / 'log')
        assert outcome.error is None, outcome.log
        seen.append(outcome.value)
    different = [{key for key in one if one[key] != other[key]} for one, other in pairwise(seen)]
    assert different == [{'latency'}, {'importance', 'data'}, {'data'}]


def facts(config, checkpoint, **smart):
    """What the tests below look at, from a process of its own."""
    from torch.nn.functional import cross_entropy

    from mmsmart.engine.export import read_config
    from mmsmart.engine.sensitivity import TrainedNet, measure
    from mmsmart.sensitivity import Grid, silenced

    net = TrainedNet(read_config(config, {'smart': {**SMART, **smart}}), checkpoint, images=20)
    model = net._model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grid = Grid(densities=[0.5], sparsities=[0.5], resources=['params'])
    rows = list(measure(net, grid, '10%'))
    changed = [key for key, x in model.state_dict().items() if not torch.equal(x, before[key])]
    # The same loss by hand: the norms' statistics are those of all images here.
    with net.masks('params', 0.0) as masks:
        part = net.parts[3]
        with silenced(masks, part.thinned(masks.importance.detach(), 0.5)), torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.train()
                    module.momentum = 1.0
            ((data, count),) = net._batches
            model(**data, mode='tensor')
            model.eval()
            scores = model(**data, mode='tensor')
            labels = torch.cat([sample.gt_label for sample in data['data_samples']])
            loss = cross_entropy(scores, labels)
    return dict(rows=rows, changed=changed, loss=float(loss), name=part.name, count=count)


def test_losses_are_those_of_the_pruned_network_and_no_weight_is_changed(tmp_path, digits):
    found = apart(facts, *digits, log=tmp_path / 'log')
    assert found.error is None, found.log
    assert found.value['changed'] == [] and found.value['count'] == 20
    (row,) = [row for row in found.value['rows'] if row.get('name') == found.value['name']]
    assert row['loss'] == pytest.approx(found.value['loss'], rel=1e-5)


def channel_rows(config, checkpoint):
    from mmsmart.engine.export import read_config
    from mmsmart.engine.sensitivity import TrainedNet, measure
    from mmsmart.sensitivity import Grid

    net = TrainedNet(read_config(config, {'smart': dict(block='channel')}), checkpoint, images=4)
    grid = Grid(densities=[0.5], sparsities=[0.5], resources=['macs'])
    return list(measure(net, grid, 0.1)), [part.name for part in net.parts]


def test_coupled_channels_are_measured_by_group(tmp_path, digits):
    pytest.importorskip('torch_pruning')
    outcome = apart(channel_rows, *digits, log=tmp_path / 'log')
    assert outcome.error is None, outcome.log
    rows, groups = outcome.value
    assert [row['name'] for row in rows if row['what'] == 'layer'] == groups
    assert all(row['kept'] == 0.5 for row in rows if row['what'] == 'layer')
    (network,) = [row for row in rows if row['what'] == 'network' and row['rules'] == []]
    assert 0.3 < network['kept'] <= 0.5


def random_checkpoint(config: Path) -> Path:
    """Weights of a network as it is built."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    config = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    path = Path(config.work_dir).with_suffix('.pth')
    torch.save({'state_dict': model.state_dict()}, path)
    return path


def measured_twice(config: Path, *excluded: str) -> list:
    """Rows of two measurements of a network, one after the other, and whose images they are of."""
    from mmsmart.engine.export import read_config
    from mmsmart.engine.sensitivity import TrainedNet, measure
    from mmsmart.sensitivity import Grid

    rules = [dict(pattern=name, exclude=True) for name in excluded]
    smart = {**SMART, 'layers': rules}
    net = TrainedNet(read_config(config, {'smart': smart}), random_checkpoint(config), images=2)
    grid = Grid(densities=[0.25], sparsities=[0.5], resources=['macs'])
    return [list(measure(net, grid, '5%')) for _ in range(2)] + [net.data]


def test_a_detector_that_samples_boxes_has_the_same_losses_again(tmp_path):
    pytest.importorskip('mmcv._ext', reason='detectors need the compiled ops of mmcv')
    pytest.importorskip('mmdet')
    changes = mask_rcnn(write_coco(tmp_path / 'coco'), tmp_path / 'work')
    config = write_config(tmp_path / 'config.py', changes, [upstream_config('mmdet', MASK_RCNN)])
    arguments = (config, 'backbone', 'neck')
    outcome = assert_finished(measured_twice, *arguments, log=tmp_path / 'log')
    first, second, data = outcome.value
    assert first == second and data == 'training'
    losses = [row['loss'] for row in first if row['what'] == 'layer']
    assert len(losses) > 5 and len(set(losses)) > 5


def test_a_segmentor_is_measured(tmp_path):
    pytest.importorskip('mmseg')
    changes = deeplab(write_segmentation(tmp_path / 'tiny'), tmp_path / 'work')
    config = write_config(tmp_path / 'config.py', changes, [upstream_config('mmseg', DEEPLAB)])
    outcome = assert_finished(measured_twice, config, 'backbone', log=tmp_path / 'log')
    first, second, data = outcome.value
    assert first == second and data == 'training'
    assert all(row['loss'] > 0 for row in first if 'reason' not in row)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'checkpoint: none is no file'),
        (('absent.pth',), 'absent.pth: there is no such checkpoint'),
        (('--allow', 'much'), 'allow: expected a rise of the loss above 0'),
        (('--images', '1'), 'images: expected an integer above 1, got 1'),
        (('--densities', '1.5'), 'densities: expected numbers between 0 and 1'),
        (('--cfg-options', 'smart.block=2:4'), "smart.block: '2:4' fixes the density"),
    ],
)
def test_what_can_not_be_measured_is_refused(tmp_path, digits, arguments, message):
    config, checkpoint = digits
    if arguments[:1] == ('--cfg-options',):
        arguments = (checkpoint, *arguments)
    outcome = apart(
        run_tool, TOOL, config, *arguments, '--out', tmp_path / 'out', log=tmp_path / 'l'
    )
    assert outcome.error.startswith('SystemExit: tools/sensitivity.py: ')
    assert message in outcome.error
    assert not (tmp_path / 'out').exists()
