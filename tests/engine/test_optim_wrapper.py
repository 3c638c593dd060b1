"""Optimiser wrappers step latent weights and importance, and nothing past them."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import nn

from mmsmart import install_masks
from mmsmart.engine import SmartAmpOptimWrapper, SmartOptimWrapper
from mmsmart.methods import METHODS

LR = 0.1


def searching(wrapper_type=SmartOptimWrapper, temperature=1.0, method=None, **settings):
    """A small model in the middle of a search, its masks and its wrapper."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    masks = install_masks(model, sparsity=0.5, block=(2, 2, 1, 1), method=method)
    weight_decay = settings.pop('weight_decay', 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=weight_decay)
    wrapper = wrapper_type(optimizer=optimizer, **settings)
    wrapper.attach(masks)
    masks.begin(torch.randn(masks.num_blocks, generator=generator), temperature)
    return model, masks, wrapper


def batch(size=8, seed=1):
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(model, images):
    return model(images).square().mean()


def step(model, wrapper, images):
    with wrapper.optim_context(model):
        loss = loss_of(model, images)
    wrapper.update_params(loss)


def latent_of(masks):
    return [weight.clone() for weight in masks.state_dict()['latent']]


def elementwise_masks(masks):
    parts = masks.mask().split(masks.plan.layer_sizes)
    return [layer.expand(f).clone() for layer, f in zip(masks.layers, parts)]


def expected_step(model, masks, images, max_norm=float('inf'), weight_decay=0.0):
    """The latent weights that one clipped SGD step must give, by autograd through w * f alone."""
    names = [f'{layer.name}.weight' for layer in masks.layers]
    latent = [weight.requires_grad_() for weight in latent_of(masks)]
    masked = dict(zip(names, (w * f for w, f in zip(latent, elementwise_masks(masks)))))
    rest = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
        if name not in names
    }
    loss = torch.func.functional_call(model, {**masked, **rest}, images).square().mean()
    grads = torch.autograd.grad(loss, [*latent, *rest.values()])
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    scale = min(1.0, max_norm / float(norm))
    return [
        (w - LR * (scale * grad + weight_decay * w)).detach() for w, grad in zip(latent, grads)
    ], float(norm)


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
def test_step_moves_latent_weights(weight_decay):
    model, masks, wrapper = searching(weight_decay=weight_decay)
    expected, _ = expected_step(model, masks, batch(), weight_decay=weight_decay)
    step(model, wrapper, batch())
    for latent, wanted in zip(latent_of(masks), expected):
        torch.testing.assert_close(latent, wanted)


def test_clipping_measures_the_gradients_of_latent_weights():
    model, masks, _ = searching()
    _, norm = expected_step(model, masks, batch())
    model, masks, wrapper = searching(clip_grad=dict(max_norm=norm / 3))
    expected, _ = expected_step(model, masks, batch(), max_norm=norm / 3)
    step(model, wrapper, batch())
    for latent, wanted in zip(latent_of(masks), expected):
        torch.testing.assert_close(latent, wanted)


def test_clipping_leaves_the_importance_alone():
    free, clipped = searching(), searching(clip_grad=dict(max_norm=1e-3))
    for model, _, wrapper in (free, clipped):
        step(model, wrapper, batch())
    assert torch.equal(free[1].importance, clipped[1].importance)


HALF_ON_CPUS = dict(wrapper_type=SmartAmpOptimWrapper, dtype='bfloat16')


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
@pytest.mark.parametrize('method', ['smart', 'taylor', 'agp', 'pdp'])
@pytest.mark.parametrize('settings', [{}, HALF_ON_CPUS], ids=['full', 'half'])
@pytest.mark.parametrize('where', ['0.weight', '0.bias'])
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_gradient_that_is_not_finite_steps_nothing(method, settings, where, value):
    model, masks, wrapper = searching(method=METHODS[method](), **settings)
    step(model, wrapper, batch(seed=0))
    before = copy.deepcopy((latent_of(masks), masks.importance, model.state_dict()))
    mask = masks.mask()
    loss_of(model, batch()).backward()
    model.get_parameter(where).grad.view(-1)[0] = value
    with pytest.raises(FloatingPointError, match=r'loss: .* nothing was stepped .* --resume'):
        wrapper.step()
    after = latent_of(masks), masks.importance, model.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(masks.mask(), mask)


def test_optimiser_that_decays_by_default_does_not_decay_the_importance():
    model, masks, wrapper = searching(importance=dict(optimizer=dict(type='AdamW')))
    plain_model, plain, plain_wrapper = searching(importance=dict(optimizer=dict(type='Adam')))
    step(model, wrapper, batch())
    step(plain_model, plain_wrapper, batch())
    assert torch.equal(masks.importance, plain.importance)


def test_masks_of_the_next_iteration_have_the_next_temperature():
    model, masks, wrapper = searching(temperature=1.0)
    wrapper.temperature = 0.25
    step(model, wrapper, batch())
    assert masks.temperature == 0.25
    kept = float((masks.plan.cost * masks.mask()).sum())
    assert kept == pytest.approx(masks.budget, rel=1e-5)


def test_accumulated_halves_step_like_the_whole_batch():
    whole, halves = searching(), searching(accumulative_counts=2)
    halves[2].initialize_count_status(halves[0], 0, 2)
    step(whole[0], whole[2], batch())
    before = latent_of(halves[1])
    step(halves[0], halves[2], batch()[:4])
    assert all(torch.equal(old, new) for old, new in zip(before, latent_of(halves[1])))
    step(halves[0], halves[2], batch()[4:])
    torch.testing.assert_close(whole[1].importance, halves[1].importance)
    for one, other in zip(whole[0].parameters(), halves[0].parameters()):
        torch.testing.assert_close(one, other)


def test_importance_has_a_rate_of_its_own_and_no_weight_decay():
    _, masks, wrapper = searching(
        weight_decay=0.5, importance=dict(lr=0.07, optimizer=dict(type='SGD', momentum=0.9))
    )
    (group,) = wrapper.importance_optimizer.param_groups
    assert (group['lr'], group['momentum'], group['weight_decay']) == (0.07, 0.9, 0)
    assert group['params'] == [masks.importance]
    held = {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert id(masks.importance) not in held
    assert LR in wrapper.get_lr()['lr'] and 0.07 not in wrapper.get_lr()['lr']


def test_importance_follows_its_gradient():
    """SGD on the importance moves it against the gradient through the budgeted mask."""
    model, masks, wrapper = searching(importance=dict(lr=0.5, optimizer=dict(type='SGD')))
    before = masks.importance.detach().clone()
    wrapper.backward(loss_of(model, batch()))
    wrapper.step()
    torch.testing.assert_close(masks.importance.detach(), before - 0.5 * masks.importance.grad)
    assert bool(masks.importance.grad.any())


def test_no_gradient_is_held_between_steps():
    model, masks, wrapper = searching()
    step(model, wrapper, batch())
    assert masks.importance.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('steps_before', [1, 5])
def test_state_goes_on_bit_for_bit(steps_before):
    model, masks, wrapper = searching()
    for seed in range(steps_before):
        step(model, wrapper, batch(seed=seed))
    file = io.BytesIO()
    torch.save((model.state_dict(), wrapper.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)

    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    del other.block_masks
    other_masks = install_masks(other, sparsity=0.5, block=(2, 2, 1, 1))
    other_wrapper = SmartOptimWrapper(optimizer=torch.optim.SGD(other.parameters(), lr=LR))
    other_wrapper.attach(other_masks)
    other_wrapper.load_state_dict(state)
    for seed in range(9, 12):
        step(model, wrapper, batch(seed=seed))
        step(other, other_wrapper, batch(seed=seed))
    assert torch.equal(masks.importance, other_masks.importance)
    for one, two in zip(model.parameters(), other.parameters()):
        assert torch.equal(one, two)


def test_state_of_a_dense_run_can_be_loaded():
    model, masks, wrapper = searching()
    dense = torch.optim.SGD(model.parameters(), lr=0.5).state_dict()
    wrapper.load_state_dict(dense)
    assert wrapper.get_lr()['lr'] == [0.5]
    assert masks.state == 'soft'


def test_wrapper_without_masks_refuses_to_step():
    model = nn.Linear(2, 2)
    wrapper = SmartOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(RuntimeError, match='SmartPruningHook'):
        wrapper.update_params(model(torch.ones(1, 2)).sum())


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_mixed_precision_is_refused_on_a_cpu():
    with pytest.raises(AssertionError, match='only available training on gpu'):
        searching(SmartAmpOptimWrapper)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1.0)])
def test_bfloat16_trains_on_a_cpu(clip_grad):
    model, masks, wrapper = searching(SmartAmpOptimWrapper, dtype='bfloat16', clip_grad=clip_grad)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = [masks.importance.detach().clone(), *map(torch.clone, latent_of(masks))]
    with wrapper.optim_context(model):
        loss = loss_of(model, batch())
    wrapper.update_params(loss)
    assert seen == [torch.bfloat16]
    after = [masks.importance.detach(), *latent_of(masks)]
    assert not any(torch.equal(old, new) for old, new in zip(before, after))
    assert {tensor.dtype for tensor in after} == {torch.float32}
    assert wrapper.state_dict()['loss_scaler'] == {}


@pytest.fixture
def mixed(monkeypatch):
    """Makes a search in mixed precision, with loss scaling, on the CPU."""
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('a loss scaler for the CPU needs torch 2.3')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    scaler = functools.partial(torch.amp.GradScaler, device='cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)

    def make(scale, **settings):
        loss_scale = dict(init_scale=scale, growth_interval=10**6)
        return searching(SmartAmpOptimWrapper, loss_scale=loss_scale, **settings)

    return make


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1.0)])
def test_loss_scale_changes_neither_weights_nor_importance(mixed, clip_grad):
    ends = []
    for scale in (1.0, 2.0**12):
        model, masks, wrapper = mixed(scale, clip_grad=clip_grad, temperature=0.5)
        for seed in range(3):
            step(model, wrapper, batch(seed=seed))
        wrapper.backward(loss_of(model, batch()))
        wrapper.step()
        ends.append((masks.importance.detach(), masks.importance.grad, *latent_of(masks)))
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_mixed_precision_computes_in_half_and_keeps_masks_in_full(mixed):
    model, masks, wrapper = mixed(1.0, dtype='bfloat16')
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step(model, wrapper, batch())
    assert seen == [torch.bfloat16]
    assert masks.importance.dtype == masks.mask().dtype == torch.float32
    assert {weight.dtype for weight in latent_of(masks)} == {torch.float32}


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1.0)])
@pytest.mark.parametrize('where', ['0.weight', '0.bias'])
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_overflow_anywhere_steps_neither_weights_nor_importance(mixed, where, value, clip_grad):
    model, masks, wrapper = mixed(2.0**12, clip_grad=clip_grad)
    step(model, wrapper, batch(seed=0))
    before = [masks.importance.detach().clone(), *latent_of(masks), model[0].bias.clone()]
    wrapper.backward(loss_of(model, batch()))
    model.get_parameter(where).grad.view(-1)[0] = value
    wrapper.step()
    after = [masks.importance.detach(), *latent_of(masks), model[0].bias]
    assert all(torch.equal(old, new) for old, new in zip(before, after))
    assert wrapper.loss_scaler.get_scale() == 2.0**11
    wrapper.zero_grad()
    step(model, wrapper, batch())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_state_in_mixed_precision_holds_scale_and_masks(mixed):
    _, _, wrapper = mixed(2.0**5)
    state = wrapper.state_dict()
    assert state['loss_scaler']['scale'] == 2.0**5
    assert state['smart']['masks']['state'] == 'soft'
