"""With `smart.recalibrate`, BatchNorm's statistics are measured anew when the masks turn hard."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.model import BaseModel, ExponentialMovingAverage
from torch import nn
from torch.utils.data import DataLoader

from engine.runs import apart, begun, finished, merged, smart_config, train, train_here
from engine.test_resume import DROPOUT, EMA_OF_BUFFERS
from mmsmart.engine.calibration import recalibrate

IMAGES, BATCH = 22, 4


class Preprocessor(nn.Module):
    def forward(self, data, training=False):
        return dict(inputs=torch.stack(data['inputs']))


class Network(BaseModel):
    def __init__(self):
        super().__init__(data_preprocessor=Preprocessor())
        self.first, self.kept = nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3)
        self.dropout, self.last = nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=None)
        self.kept.running_mean.fill_(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.kept.eval()  # as `norm_eval` does
        return self

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.last(self.dropout(self.kept(self.first(inputs)))).mean())


def runner_of(model, images=IMAGES):
    data = [dict(inputs=torch.randn(3, 4, 4) + index) for index in range(images)]
    loader = DataLoader(data, batch_size=BATCH, collate_fn=pseudo_collate, shuffle=True)
    logger = SimpleNamespace(info=lambda text: None)
    return SimpleNamespace(train_dataloader=loader, model=model, logger=logger)


def batches_by_hand(runner, count):
    data = runner.train_dataloader.dataset
    order = list(DefaultSampler(data, shuffle=True, seed=0))
    batches = [order[at : at + BATCH] for at in range(0, count * BATCH, BATCH)]
    return [torch.stack([data[index]['inputs'] for index in batch]) for batch in batches]


def average(values):
    return torch.stack(values).mean(0)


@pytest.mark.parametrize('count', [1, 3])
def test_statistics_are_plain_averages_over_the_batches(count):
    model = Network().train()
    runner = runner_of(model)
    recalibrate(runner, model, count)
    batches = batches_by_hand(runner, count)
    torch.testing.assert_close(
        model.first.running_mean, average([x.mean((0, 2, 3)) for x in batches])
    )
    torch.testing.assert_close(
        model.first.running_var, average([x.var((0, 2, 3)) for x in batches])
    )
    # The last layer sees what the others give in evaluation, normalised batch by batch.
    passed = [(nn.functional.batch_norm(x, None, None, training=True) - 0.5) for x in batches]
    torch.testing.assert_close(
        model.last.running_mean, average([x.mean((0, 2, 3)) for x in passed]), atol=1e-4, rtol=1e-4
    )


def test_nothing_but_statistics_changes():
    model = Network().train()
    runner = runner_of(model)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    recalibrate(runner, model, 3)
    assert torch.equal(drawn, torch.get_rng_state())
    assert [module.training for module in model.modules()] == flags
    assert (model.first.momentum, model.kept.momentum, model.last.momentum) == (0.3, 0.1, None)
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {key for key, x in model.state_dict().items() if not torch.equal(x, before[key])}
    assert changed == {
        f'{layer}.{key}'
        for layer in ('first', 'last')
        for key in ('running_mean', 'running_var', 'num_batches_tracked')
    }


def test_zero_batches_leave_everything():
    model = Network().train()
    before = copy.deepcopy(model.state_dict())
    recalibrate(runner_of(model), model, 0)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_a_last_batch_of_fewer_images_is_left_out_unless_it_is_the_only_one():
    for images, counted in ((IMAGES, 5), (3, 1)):
        model = Network().train()
        recalibrate(runner_of(model, images), model, 100)
        assert model.first.num_batches_tracked == counted


@pytest.mark.parametrize('own', [False, True])
def test_averages_with_statistics_of_their_own_get_their_own(own):
    model = Network().train()
    moving = ExponentialMovingAverage(model, update_buffers=own)
    moving.module.first.weight.data.fill_(2.0)
    moving.module.eval()
    before = moving.module.last.running_mean.clone()
    runner = runner_of(model)
    recalibrate(runner, model, 3, [moving])
    assert torch.equal(before, moving.module.last.running_mean) != own
    if own:
        torch.testing.assert_close(moving.module.first.running_var, model.first.running_var)
        assert bool((moving.module.last.running_var > 2 * model.last.running_var).all())


def test_synchronised_layers_of_another_package_are_measured_and_instance_norm_is_not():
    class SyncBatchNorm(nn.BatchNorm2d.__base__.__base__):  # mmcv's is no `_BatchNorm` either
        forward = nn.BatchNorm2d.forward
        _check_input_dim = nn.BatchNorm2d._check_input_dim

    model = Network().train()
    model.first = SyncBatchNorm(3)
    model.last = nn.InstanceNorm2d(3, track_running_stats=True)
    before = model.last.running_mean.clone()
    recalibrate(runner_of(model), model, 2)
    assert model.first.num_batches_tracked == 2
    assert torch.equal(model.last.running_mean, before)


def measured_on(rank, rendezvous):
    """The first layer's mean as it was measured, and that of this process's own share."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = Network().train()
    runner = runner_of(model)
    recalibrate(runner, model, 2)
    own = average([x.mean((0, 2, 3)) for x in batches_by_hand(runner, 2)])
    return model.first.running_mean.tolist(), own.tolist()


def test_processes_share_the_average_over_the_images_of_all(tmp_path):
    started = [
        begun(measured_on, rank, tmp_path / 'rendezvous', log=tmp_path / f'log{rank}.txt')
        for rank in range(2)
    ]
    (one, first), (two, second) = (finished(*process).value for process in started)
    assert one == two
    assert first != second
    torch.testing.assert_close(torch.tensor(one), (torch.tensor(first) + torch.tensor(second)) / 2)


# Runs of 24 iterations, 6 an epoch; the masks turn hard after 18, and epoch 3 is validated then.


def trained_noting_statistics(config):
    """Statistics before and after the recalibration of a run, and what its witness noted."""
    hook = importlib.import_module('mmsmart.engine.pruning_hook')
    measured, seen = hook.recalibrate, {}

    def statistics(model):
        return {key: x.tolist() for key, x in model.state_dict().items() if '.running_' in key}

    def noted(runner, model, *args):
        seen.update(iter=runner.iter, before=statistics(model))
        measured(runner, model, *args)
        seen.update(after=statistics(model))

    hook.recalibrate = noted
    return train_here(config), seen


@pytest.fixture(scope='module')
def recalibrated(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('recalibrated')
    config = smart_config(work_dir, dict(recalibrate=4), **merged(DROPOUT, EMA_OF_BUFFERS))
    config['custom_hooks'] = [*config['custom_hooks'], dict(type='Witness')]
    outcome = apart(trained_noting_statistics, config, log=work_dir / 'stdout.txt')
    assert outcome.error is None, outcome.log
    return work_dir, *outcome.value, outcome.log


def test_statistics_are_measured_once_when_the_masks_turn_hard(recalibrated):
    _, _, seen, log = recalibrated
    assert seen['iter'] == 17
    assert all(seen['before'][key] != after for key, after in seen['after'].items())
    assert log.count('BatchNorm layers were measured anew over 4 batches') == 1


def test_search_and_data_are_those_of_a_run_without_it(recalibrated, tmp_path):
    _, notes, _, _ = recalibrated
    plain = train(smart_config(tmp_path, **merged(DROPOUT, EMA_OF_BUFFERS)))
    assert plain.error is None, plain.log
    # In training mode nothing is computed with running statistics.
    assert plain.value == notes
    checkpoints = [
        torch.load(folder / 'epoch_3.pth', weights_only=False)['ema_state_dict']
        for folder in (tmp_path, recalibrated[0])
    ]
    differing = {
        key for key, x in checkpoints[0].items() if not torch.equal(x, checkpoints[1][key])
    }
    assert differing and all('running_' in key or 'tracked' in key for key in differing)
