"""Tests of mmsmart.masking against plain autograd through explicitly masked weights."""

import copy
import gc
import itertools
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from mmsmart import install_masks, masks_of, remove_masks
from mmsmart.functional import soft_topk
from mmsmart.methods import Smart

BLOCK = (2, 4, 1, 1)
few = settings(max_examples=30)


class Net(nn.Module):
    """One of each: a plain, a grouped and twice used, a transposed and a linear layer."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.norm(self.stem(x)).tanh()
        for _ in range(2):
            if self.reentrant is None:
                x = self.segment(x)
            else:
                x = checkpoint(self.segment, x, use_reentrant=self.reentrant)
        return self.head(self.up(x).tanh().mean((2, 3)))

    def segment(self, x):
        return x + self.shared(x).tanh()


def net(reentrant=None, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Net(reentrant).to(dtype)


def batches(count, dtype=torch.float64, size=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(size, 3, 5, 5, generator=generator, dtype=torch.float64)
        yield x.to(dtype), torch.randint(5, (size,), generator=generator)


def first_importance(masks, seed=2):
    return torch.randn(masks.num_blocks, generator=torch.Generator().manual_seed(seed))


def fall(start, end, steps):
    """Temperatures of `steps` + 1 masks, falling geometrically."""
    return [start * (end / start) ** (i / steps) for i in range(steps + 1)]


def searching(model, sparsity=0.6, block=BLOCK, temperature=1.0, layers=()):
    """Install masks and begin the search."""
    masks = install_masks(model, sparsity, block, layers)
    masks.begin(first_importance(masks), temperature)
    return masks


def optimisers(model, masks, weights='sgd'):
    if weights == 'sgd':
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return optimizer, torch.optim.Adam([masks.importance], lr=0.05)


def train(model, masks, optimizers, data, temperatures):
    """Loop as a user writes it; the temperatures are those of the masks after each step."""
    losses = []
    for (x, y), temperature in zip(data, temperatures):
        loss = cross_entropy(model(x), y)
        loss.backward()
        with masks.latent_weights(temperature):
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def latents(masks):
    """Copy the latent weights of a search, by layer name."""
    with masks.latent_weights():
        return {layer.name: layer.weight.detach().clone() for layer in masks.layers}


class Explicit:
    """Reference: latent weights and importance as plain leaves, masked inside the graph.

    It shares with the code under test how blocks lie (`expand`) and the differentiable top-k, both
    tested on their own; autograd does all the rest.
    """

    def __init__(self, model, masks):
        self.model, self.masks = model, masks
        self.latent = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        self.importance = first_importance(masks).requires_grad_()

    def parameters(self):
        return list(self.latent.values())

    def __call__(self, x, temperature):
        f = soft_topk(self.importance, self.masks.budget, temperature, self.masks.plan.cost)
        weights = dict(self.latent)
        for layer, part in zip(self.masks.layers, f.split(self.masks.plan.layer_sizes)):
            weights[f'{layer.name}.weight'] = weights[f'{layer.name}.weight'] * layer.expand(part)
        return functional_call(self.model, weights, x)


def hand_cut_zeros(weight, block, groups=1, transposed=False):
    """Count blocks that are all zero, and cost of the others: slices and loops, nothing of ours.

    Also fails where a block is neither all zero nor without a zero.
    """
    pruned, kept = [], []
    for part in weight.chunk(groups):
        part = part.transpose(0, 1) if transposed else part
        lengths = (*block, *[block[-1]] * part.ndim)[: part.ndim]
        steps = [n if b == -1 else min(b, n) for b, n in zip(lengths, part.shape)]
        starts = [range(0, n, step) for n, step in zip(part.shape, steps)]
        for corner in itertools.product(*starts):
            box = part[tuple(slice(i, i + step) for i, step in zip(corner, steps))]
            zeros = int((box == 0).sum())
            assert zeros in (0, box.numel())
            (pruned if zeros else kept).append(box.numel())
    return pruned, kept


def assert_no_negative_zero(tensor):
    assert not bool((torch.signbit(tensor) & (tensor == 0)).any())


def pruned_entries(masks):
    parts = masks.hard_mask().split(masks.plan.layer_sizes)
    return {layer.name: layer.expand(part) == 0 for layer, part in zip(masks.layers, parts)}


# The model stays the stock model


def test_installed_masks_change_nothing_before_the_search():
    model, stock = net(), net()
    masks = install_masks(model, 0.6, BLOCK)
    optimizers = optimisers(model, masks)
    data = list(batches(5))
    train(model, masks, optimizers, data, [1.0] * 5)
    reference = torch.optim.SGD(
        stock.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True
    )
    for x, y in data:
        cross_entropy(stock(x), y).backward()
        reference.step()
        reference.zero_grad()
    assert masks.state == 'dense'
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters()))


def test_state_dict_parameters_and_classes_never_change():
    model, stock = net(), net()

    def face(m):
        return (
            [(key, value.shape, value.dtype) for key, value in m.state_dict().items()],
            [(name, p.shape, p.requires_grad) for name, p in m.named_parameters()],
            [(name, type(module)) for name, module in m.named_modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in m.modules()],
        )

    identities = [id(p) for p in model.parameters()]
    masks = install_masks(model, 0.6, BLOCK)
    assert face(model) == face(stock)
    masks.begin(first_importance(masks), 1.0)
    assert face(model) == face(stock)
    train(model, masks, optimisers(model, masks), batches(2), [0.5, 0.2])
    assert face(model) == face(stock)
    masks.harden()
    assert face(model) == face(stock)
    remove_masks(model)
    assert face(model) == face(stock)
    assert [id(p) for p in model.parameters()] == identities


@pytest.mark.parametrize('stage', ['dense', 'soft', 'hard'])
def test_the_stock_model_computes_the_same_from_our_state_dict(stage):
    model, stock = net(), net(seed=9)
    masks = install_masks(model, 0.6, BLOCK)
    if stage != 'dense':
        masks.begin(first_importance(masks), 0.5)
        train(model, masks, optimisers(model, masks), batches(3), [0.4, 0.3, 0.2])
    if stage == 'hard':
        masks.harden()
    stock.load_state_dict(model.state_dict(), strict=True)
    ((x, _),) = batches(1)
    assert torch.equal(stock(x), model(x))


def test_a_stock_checkpoint_loads_strictly_and_is_what_the_search_starts_from():
    model, stock = net(seed=9), net()
    masks = install_masks(model, 0.6, BLOCK)
    model.load_state_dict(stock.state_dict(), strict=True)
    masks.begin(first_importance(masks), 1.0)
    for name, latent in latents(masks).items():
        assert torch.equal(latent, stock.get_submodule(name).weight)


def test_remove_masks_leaves_the_weights_the_network_computes_with():
    model = net()
    searching(model)
    ((x, _),) = batches(1)
    before = model(x)
    remove_masks(model)
    assert masks_of(model) is None
    assert torch.equal(model(x), before)
    install_masks(model, 0.5, BLOCK)


# The search: soft masks


def test_parameters_hold_masked_weights_during_the_search():
    model, stock = net(), net()
    masks = searching(model, temperature=0.7)
    f = soft_topk(first_importance(masks), masks.budget, 0.7, masks.plan.cost)
    assert torch.equal(masks.mask(), f)
    masked = {layer.name for layer in masks.layers}
    for layer, part in zip(masks.layers, f.split(masks.plan.layer_sizes)):
        weight = stock.get_submodule(layer.name).weight
        assert torch.equal(layer.weight, weight * layer.expand(part))
    for name, parameter in model.named_parameters():
        if name.removesuffix('.weight') not in masked or not name.endswith('.weight'):
            assert torch.equal(parameter, stock.get_parameter(name))


@pytest.mark.parametrize('temperature', [1e-3, 0.03, 1.0, 30.0])
@pytest.mark.parametrize('sparsity', [0.05, 0.6, 0.97])
def test_the_soft_mask_meets_the_budget(sparsity, temperature):
    may_vanish = [dict(pattern='*', min_density=0)]
    masks = searching(net(), sparsity, temperature=temperature, layers=may_vanish)
    spent = float((masks.plan.cost * masks.mask()).sum())
    assert spent == pytest.approx(masks.budget, rel=1e-6)
    assert masks.soft_sparsity() == pytest.approx(sparsity, abs=1e-6)


def test_the_soft_mask_meets_the_budget_after_every_step():
    model = net()
    masks = searching(model, 0.8)
    temperatures = fall(1.0, 0.01, 15)[1:]
    for batch, temperature in zip(batches(15), temperatures):
        train(model, masks, optimisers(model, masks), [batch], [temperature])
        assert masks.temperature == temperature
        assert float((masks.plan.cost * masks.mask()).sum()) == pytest.approx(
            masks.budget, rel=1e-6
        )


def one_gradient(reentrant=None, passes=1, sparsity=0.6):
    """Gradients that an optimiser finds, and those of the explicit reference."""
    model, stock = net(reentrant), net()
    masks = searching(model, sparsity, temperature=0.8)
    reference = Explicit(stock, masks)
    for x, y in batches(passes):
        # Reentrant checkpointing needs an input with a gradient to find its way back.
        cross_entropy(model(x.clone().requires_grad_()), y).backward()
        cross_entropy(reference(x, 0.8), y).backward()
    with masks.latent_weights():
        ours = {name: p.grad.clone() for name, p in model.named_parameters()}
        ours['importance'] = masks.importance.grad.clone()
    theirs = {name: p.grad for name, p in reference.latent.items()}
    theirs['importance'] = reference.importance.grad
    return ours, theirs


@pytest.mark.parametrize('reentrant', [None, True, False])
@pytest.mark.parametrize('passes', [1, 3])
def test_gradients_equal_autograd_through_the_masked_weights(reentrant, passes):
    """Weights in float64 to 1e-12; the importance is float32 and agrees to its last digits."""
    ours, theirs = one_gradient(reentrant, passes)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        scale = theirs[name].abs().max()
        assert scale > 0, name
        tolerance = 1e-12 if theirs[name].dtype == torch.float64 else 1e-6
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def test_gradients_equal_finite_differences_of_the_loss():
    """Nothing of ours but the masks themselves: the loss after a small move of m and w."""
    model = net()
    masks = searching(model, temperature=0.8)
    ((x, y),) = batches(1)
    cross_entropy(model(x), y).backward()
    with masks.latent_weights():
        gradient = masks.importance.grad.double()
        weight_gradient = masks.layers[0].weight.grad.clone()

    def loss(move_m, move_w=0.0):
        fresh = net()
        fresh.stem.weight.data += move_w
        other = install_masks(fresh, 0.6, BLOCK)
        other.begin((first_importance(masks).double() + move_m).float(), 0.8)
        return cross_entropy(fresh(x), y).item()

    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(masks.num_blocks, generator=generator, dtype=torch.float64)
    step = 1e-2
    slope = (loss(step * direction) - loss(-step * direction)) / (2 * step)
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-2)
    across = torch.randn(weight_gradient.shape, generator=generator, dtype=torch.float64)
    slope = (loss(0.0, 1e-5 * across) - loss(0.0, -1e-5 * across)) / 2e-5
    assert slope == pytest.approx(float((weight_gradient * across).sum()), rel=1e-6)


@pytest.mark.parametrize('weights', ['sgd', 'adamw'])
def test_a_search_equals_training_with_explicitly_masked_weights(weights):
    """40 steps; the two solve for the threshold from different starts, to 5e-9 of the budget."""
    model, stock = net(), net()
    masks = searching(model)
    reference = Explicit(stock, masks)
    temperatures = fall(1.0, 0.05, 40)
    data = list(batches(40))
    losses = train(model, masks, optimisers(model, masks, weights), data, temperatures[1:])

    if weights == 'sgd':
        step_w = torch.optim.SGD(
            reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True
        )
    else:
        step_w = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    step_m = torch.optim.Adam([reference.importance], lr=0.05)
    expected = []
    for (x, y), temperature in zip(data, temperatures):
        loss = cross_entropy(reference(x, temperature), y)
        loss.backward()
        for optimizer in (step_w, step_m):
            optimizer.step()
            optimizer.zero_grad()
        expected.append(loss.item())

    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(masks.importance.data, reference.importance.data, rtol=0, atol=2e-5)
    assert masks.moved() > 0
    for name, latent in latents(masks).items():
        theirs = reference.latent[f'{name}.weight'].detach()
        torch.testing.assert_close(latent, theirs, rtol=0, atol=1e-5)


def bytes_alive():
    """Bytes of all tensors that Python knows, views of one memory counted once."""
    gc.collect()
    tensors = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
    storages = (x.untyped_storage() for x in tensors if x.layout == torch.strided)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(('curvature', 'expected'), [(0.0, 12), (1.0, 16)])
def test_the_search_holds_few_bytes_a_block_beside_the_masked_weights(curvature, expected):
    """Between steps: the importance, Adam's two moments, and the squares of the curvature."""
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 33))
    before = bytes_alive()
    masks = install_masks(model, 0.6, (1, 1), method=Smart(curvature=curvature))
    masks.begin(first_importance(masks), 1.0)
    optimizer = torch.optim.Adam([masks.importance])
    for _ in range(2):
        model(torch.ones(2, 64)).square().mean().backward()
        with masks.latent_weights():
            optimizer.step()
        model.zero_grad()
        optimizer.zero_grad()
    weights = sum(layer.weight.nbytes for layer in masks.layers)
    beside = bytes_alive() - before - weights
    assert expected <= beside / masks.num_blocks < expected + 0.1


def test_the_importance_that_was_given_is_not_touched():
    model = net()
    masks = install_masks(model, 0.6, BLOCK)
    given_importance = first_importance(masks)
    masks.begin(given_importance, 1.0)
    train(model, masks, optimisers(model, masks), batches(2), [0.5, 0.3])
    assert torch.equal(given_importance, first_importance(masks))
    assert not torch.equal(masks.importance, given_importance)


def test_clipping_sees_the_gradient_of_the_latent_weights():
    model, stock = net(), net()
    masks = searching(model, temperature=0.8)
    reference = Explicit(stock, masks)
    ((x, y),) = batches(1)
    cross_entropy(model(x), y).backward()
    cross_entropy(reference(x, 0.8), y).backward()
    with masks.latent_weights():
        ours = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        assert float(norms.norm()) <= 0.0101
    theirs = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_weight_decay_acts_on_latent_weights_not_on_masked_ones():
    model, stock = net(), net()
    masks = searching(model, temperature=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with masks.latent_weights():
        optimizer.step()
    for name, latent in latents(masks).items():
        torch.testing.assert_close(latent, stock.get_submodule(name).weight.data * 0.95)


class TwoHeads(nn.Module):
    """Of its heads only the first is run."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_without_gradient_feels_only_the_common_budget():
    torch.manual_seed(0)
    model = TwoHeads().double()
    before = model.unused.weight.detach().clone()
    reference_model = copy.deepcopy(model)
    masks = searching(model, block=(2, 2))
    reference = Explicit(reference_model, masks)
    x = torch.randn(4, 8).double()
    model(x).square().mean().backward()
    reference(x, 1.0).square().mean().backward()
    optimizers = optimisers(model, masks)
    with masks.latent_weights():
        assert model.unused.weight.grad is None
        theirs = reference.importance.grad
        tolerance = 1e-6 * float(theirs.abs().max())
        torch.testing.assert_close(masks.importance.grad, theirs, rtol=0, atol=tolerance)
        assert theirs[16:].abs().min() > 10 * tolerance  # the other head makes room
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(latents(masks)['unused'], before)
    assert float((masks.plan.cost * masks.mask()).sum()) == pytest.approx(masks.budget, rel=1e-6)


def test_an_error_inside_a_step_leaves_masked_weights_behind():
    model = net()
    masks = searching(model)
    ((x, _),) = batches(1)
    before = model(x)
    with pytest.raises(KeyError), masks.latent_weights():
        raise KeyError('out of memory, say')
    assert masks.state == 'soft'
    assert torch.equal(model(x), before)


def test_a_step_without_temperature_keeps_the_present_one():
    masks = searching(net(), temperature=0.3)
    with masks.latent_weights():
        pass
    assert masks.temperature == 0.3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_models_of_lower_precision_are_searched_and_hardened(dtype):
    model = net(dtype=dtype)
    masks = searching(model)
    train(model, masks, optimisers(model, masks), batches(4, dtype), fall(1.0, 0.1, 4)[1:])
    assert masks.importance.dtype == torch.float32
    assert float((masks.plan.cost * masks.mask()).sum()) == pytest.approx(masks.budget, rel=1e-6)
    masks.harden()
    train(model, masks, optimisers(model, masks), batches(2, dtype), [None, None])
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, pruned in pruned_entries(masks).items():
        assert torch.equal(model.get_submodule(name).weight == 0, pruned)


def test_steps_under_autocast_keep_the_budget_exact():
    model = net(dtype=torch.float32)
    masks = searching(model)
    optimizers = optimisers(model, masks)
    for (x, y), temperature in zip(batches(4, torch.float32), fall(1.0, 0.1, 4)[1:]):
        with torch.autocast('cpu', torch.bfloat16):
            assert model.stem(x).dtype == torch.bfloat16
            cross_entropy(model(x), y).backward()
            with masks.latent_weights(temperature):
                for optimizer in optimizers:
                    optimizer.step()
        spent = float((masks.plan.cost * masks.mask()).sum())
        assert spent == pytest.approx(masks.budget, rel=1e-6)
    masks.harden()
    assert masks.kept_cost() <= masks.budget < masks.kept_cost() + masks.next_block_cost()


def test_a_model_is_compiled_once_for_all_temperatures_and_stages():
    data, temperatures = list(batches(6, torch.float32)), fall(1.0, 0.1, 4)[1:]
    ends = []
    for backend in (None, torch._dynamo.testing.CompileCounter()):
        model = net(dtype=torch.float32)
        forward = model
        if backend:
            torch._dynamo.reset()
            forward = torch.compile(model, backend=backend, fullgraph=True)
        masks = searching(model)
        train(forward, masks, optimisers(model, masks), data[:4], temperatures)
        masks.harden()
        train(forward, masks, optimisers(model, masks), data[4:], [None, None])
        ends.append([*model.parameters(), masks.importance])
    assert backend.frame_count == 1
    for plain, compiled in zip(*ends):
        assert torch.equal(plain, compiled)


def test_channels_last_weights_stay_channels_last():
    model = net(dtype=torch.float32).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    masks = searching(model)
    train(model, masks, optimisers(model, masks), batches(2, torch.float32), [0.5, 0.2])
    masks.harden()
    assert [p.stride() for p in model.parameters()] == strides


def test_sparsity_zero_keeps_every_block_and_changes_nothing():
    model, stock = net(), net()
    masks = searching(model, 0.0)
    assert masks.budget == float(masks.plan.cost.sum())
    ((x, y),) = batches(1)
    assert torch.equal(model(x), stock(x))
    cross_entropy(model(x), y).backward()
    cross_entropy(stock(x), y).backward()
    with masks.latent_weights(0.5):
        assert masks.importance.grad.count_nonzero() == 0
        for parameter, theirs in zip(model.parameters(), stock.parameters()):
            assert torch.equal(parameter.grad, theirs.grad)
    masks.harden()
    assert bool(masks.hard_mask().all())
    assert (masks.kept_cost(), masks.next_block_cost()) == (masks.budget, 0.0)
    assert torch.equal(model(x), stock(x))


# The hard mask


def hardened(weights='sgd', sparsity=0.6, block=BLOCK, steps=6):
    model = net()
    masks = searching(model, sparsity, block)
    optimizers = optimisers(model, masks, weights)
    train(model, masks, optimizers, batches(steps), fall(1.0, 0.05, steps)[1:])
    masks.harden()
    return model, masks, optimizers


def test_hardening_keeps_the_most_important_blocks_that_fit():
    _, masks, _ = hardened(block=(3, 3, -1, 2))
    kept = masks.hard_mask().bool()
    spent = float(masks.plan.cost[kept].sum())
    assert spent == masks.kept_cost() <= masks.budget
    assert bool((spent + masks.plan.cost[~kept] > masks.budget).all())
    assert spent + masks.next_block_cost() > masks.budget
    strongest = masks.importance.detach().masked_fill(kept, -torch.inf).argmax()
    assert masks.next_block_cost() == float(masks.plan.cost[strongest])


def test_hardening_gives_kept_blocks_their_latent_weights():
    model = net()
    masks = searching(model)
    train(model, masks, optimisers(model, masks), batches(3), fall(1.0, 0.5, 3)[1:])
    before = latents(masks)
    masks.harden()
    for name, pruned in pruned_entries(masks).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, before[name].masked_fill(pruned, 0))
    assert torch.equal(masks.mask(), masks.hard_mask())


@pytest.mark.parametrize('weights', ['sgd', 'adamw'])
def test_pruned_weights_stay_zero_while_fine_tuning(weights):
    """Momentum, Adam's moments and weight decay left from the search all push at them."""
    model, masks, optimizers = hardened(weights)
    pruned = pruned_entries(masks)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in batches(8):
        train(model, masks, optimizers, [batch], [None])
        for name, where in pruned.items():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight == 0, where)
            assert_no_negative_zero(weight)
    assert all(not torch.equal(p, first[name]) for name, p in model.named_parameters())


def test_pruned_weights_stay_zero_whatever_an_optimiser_does_to_them():
    model, masks, _ = hardened()
    with masks.latent_weights(), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    for name, where in pruned_entries(masks).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, torch.full_like(weight, -1).masked_fill(where, 0))
        assert_no_negative_zero(weight)


@pytest.mark.parametrize('weights', ['sgd', 'adamw'])
def test_fine_tuning_equals_plain_training_with_masked_gradients(weights):
    """Kept weights to the last bit, from fresh optimisers."""
    model, masks, _ = hardened(weights)
    plain = copy.deepcopy(model)
    remove_masks(plain)
    data = list(batches(10))
    train(model, masks, optimisers(model, masks, weights), data, [None] * 10)
    optimizer, _ = optimisers(plain, masks, weights)
    pruned = pruned_entries(masks)
    for x, y in data:
        cross_entropy(plain(x), y).backward()
        for name, where in pruned.items():
            plain.get_submodule(name).weight.grad.masked_fill_(where, 0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)


def test_the_importance_rests_after_hardening():
    """Even if its last gradient was not cleared, and its optimiser goes on."""
    model = net()
    masks = searching(model)
    optimizers = optimisers(model, masks)
    ((x, y),) = batches(1)
    cross_entropy(model(x), y).backward()
    with masks.latent_weights():
        optimizers[1].step()
    masks.harden()
    before = masks.importance.detach().clone()
    mask = masks.hard_mask()
    train(model, masks, optimizers, batches(3), [None] * 3)
    assert torch.equal(masks.importance, before)
    assert torch.equal(masks.hard_mask(), mask)


def test_removing_hard_masks_leaves_a_pruned_plain_model():
    model, masks, _ = hardened()
    pruned = pruned_entries(masks)
    remove_masks(model)
    assert not any(isinstance(value, type(masks)) for value in vars(model).values())
    for name, where in pruned.items():
        assert torch.equal(model.get_submodule(name).weight == 0, where)


def test_figures_of_the_search_are_what_they_say():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    masks = install_masks(model, 0.5, (1, 1))
    assert (masks.undecided(), masks.moved(), masks.soft_sparsity()) == (0, 0, 0)
    assert torch.equal(masks.mask(), torch.ones(4))
    masks.begin(torch.tensor([3.0, 1.0, -1.0, -3.0]), 0.5)
    # Symmetric about a threshold of 0: masks σ(±6), σ(±2).
    expected = torch.tensor([6.0, 2.0, -2.0, -6.0]).sigmoid()
    torch.testing.assert_close(masks.mask(), expected, rtol=0, atol=1e-6)
    assert masks.undecided() == 0.5
    assert masks.undecided(0.2) == 0
    assert masks.moved() == 0
    masks.importance.data = torch.tensor([3.0, -1.0, 1.0, -3.0])
    assert masks.moved() == 0.5


# Copies


def test_a_copy_made_in_mid_search_trains_on_identically_and_on_its_own():
    model = net()
    masks = searching(model)
    optimizers = optimisers(model, masks)
    data, temperatures = list(batches(8)), fall(1.0, 0.1, 8)[1:]
    train(model, masks, optimizers, data[:3], temperatures[:3])
    twin = copy.deepcopy(model)
    frozen = {key: value.clone() for key, value in twin.state_dict().items()}
    twin_masks = masks_of(twin)
    twin_optimizers = optimisers(twin, twin_masks)
    for ours, theirs in zip(twin_optimizers, optimizers):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))

    train(model, masks, optimizers, data[3:], temperatures[3:])
    assert all(torch.equal(frozen[key], value) for key, value in twin.state_dict().items())

    train(twin, twin_masks, twin_optimizers, data[3:], temperatures[3:])
    assert torch.equal(twin_masks.importance, masks.importance)
    masks.harden()
    twin_masks.harden()
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))


def test_a_moving_average_meets_the_hard_mask_once_its_pruned_weights_are_zeroed():
    model = net()
    masks = searching(model)
    average = AveragedModel(model)
    optimizers = optimisers(model, masks)
    for batch, temperature in zip(batches(6), fall(1.0, 0.1, 6)[1:]):
        train(model, masks, optimizers, [batch], [temperature])
        average.update_parameters(model)
    masks.harden()
    average.update_parameters(model)
    masks.zero_pruned(average.module)
    for batch in batches(3):
        train(model, masks, optimizers, [batch], [None])
        average.update_parameters(model)
    for name, where in pruned_entries(masks).items():
        weight = average.module.get_submodule(name).weight
        assert torch.equal(weight == 0, where)
        assert not torch.equal(weight, model.get_submodule(name).weight)


def test_zeroing_a_copy_leaves_the_model_alone():
    model, masks, _ = hardened()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.fill_(1.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks.zero_pruned(other)
    for name, where in pruned_entries(masks).items():
        assert torch.equal(other.get_submodule(name).weight == 0, where)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize('through', ['pickle', 'torch.save'])
def test_a_whole_model_survives_pickling_in_mid_search(through, tmp_path):
    model = net()
    masks = searching(model)
    train(model, masks, optimisers(model, masks), batches(2), [0.6, 0.4])
    if through == 'pickle':
        back = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / 'model.pth')
        back = torch.load(tmp_path / 'model.pth', weights_only=False)
    data = list(batches(2))
    for each in (model, back):
        train(each, masks_of(each), optimisers(each, masks_of(each)), data, [0.3, 0.2])
        masks_of(each).harden()
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters()))


# Saving and going on


def checkpoint_of(model, masks, optimizers):
    return {
        'model': model.state_dict(),
        'masks': masks.state_dict(),
        'optimizers': [optimizer.state_dict() for optimizer in optimizers],
    }


def resumed(path, weights):
    """A process that knows the file alone: other weights, fresh optimisers."""
    state = torch.load(path, weights_only=True)
    model = net(seed=9)
    masks = install_masks(model, 0.6, BLOCK)
    optimizers = optimisers(model, masks, weights)
    model.load_state_dict(state['model'], strict=True)
    masks.load_state_dict(state['masks'])
    for optimizer, saved in zip(optimizers, state['optimizers']):
        optimizer.load_state_dict(saved)
    return model, masks, optimizers


@pytest.mark.parametrize('weights', ['sgd', 'adamw'])
@pytest.mark.parametrize('saved_after', [0, 5, 12, 14])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(weights, saved_after, tmp_path):
    """Ten steps of search and six of fine-tuning, saved in either."""
    data = list(batches(16))
    temperatures = [*fall(1.0, 0.05, 10)[1:], *[None] * 6]

    def run(model, masks, optimizers, steps):
        losses = []
        for step in steps:
            if step == 10:
                masks.harden()
            losses += train(model, masks, optimizers, [data[step]], [temperatures[step]])
        return losses

    model = net()
    masks = searching(model)
    optimizers = optimisers(model, masks, weights)
    run(model, masks, optimizers, range(saved_after))
    torch.save(checkpoint_of(model, masks, optimizers), tmp_path / 'iter.pth')
    rest = range(saved_after, 16)
    expected = run(model, masks, optimizers, rest)

    again = resumed(tmp_path / 'iter.pth', weights)
    assert run(*again, rest) == expected
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), model.parameters()))
    assert torch.equal(again[1].hard_mask(), masks.hard_mask())
    assert again[1].moved() == masks.moved()


def test_a_loaded_state_is_copied_not_shared():
    model = net()
    masks = searching(model)
    state = masks.state_dict()
    before = copy.deepcopy(state)
    fresh = net()
    other = install_masks(fresh, 0.6, BLOCK)
    other.load_state_dict(state)
    train(fresh, other, optimisers(fresh, other), batches(3), [0.5, 0.4, 0.3])
    train(model, masks, optimisers(model, masks), batches(3), [0.5, 0.4, 0.3])
    assert torch.equal(state['importance'], before['importance'])
    assert all(torch.equal(a, b) for a, b in zip(state['latent'], before['latent']))


def test_a_dense_state_loads_as_dense():
    masks = install_masks(net(), 0.6, BLOCK)
    other = install_masks(net(), 0.6, BLOCK)
    other.load_state_dict(masks.state_dict())
    assert other.state == 'dense'
    other.begin(first_importance(other), 1.0)


@pytest.mark.parametrize(
    ('arguments', 'differs', 'shown'),
    [
        (dict(sparsity=0.7, block=BLOCK), 'budgets', 'there'),
        (dict(sparsity=0.6, block=(2, 2, 1, 1)), 'layers', 'stem'),
        (
            dict(sparsity=0.6, block=BLOCK, layers=[dict(pattern='head', exclude=True)]),
            'layers',
            '4 there, 3 here',
        ),
    ],
)
def test_masks_of_another_plan_are_refused(arguments, differs, shown):
    state = searching(net()).state_dict()
    other = install_masks(net(), **arguments)
    with pytest.raises(ValueError) as error:
        other.load_state_dict(state)
    message = str(error.value)
    assert f'the checkpoint was made with other {differs} than this model has' in message
    assert shown in message
    assert 'Resume with the same `sparsity`, `block`, `layers` and `method`' in message
    assert other.state == 'dense'


# What is refused


def test_installing_twice_is_refused():
    model = net()
    install_masks(model, 0.5, BLOCK)
    with pytest.raises(ValueError, match='Net has block masks already') as error:
        install_masks(model)
    assert 'remove_masks(model)' in str(error.value)


def test_removing_masks_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match='Net has no block masks to remove'):
        remove_masks(net())


@pytest.mark.parametrize(
    ('action', 'message'),
    [
        (lambda masks: masks.harden(), 'cannot harden the masks: the masks are dense, not soft.'),
        (
            lambda masks: masks.zero_pruned(),
            'cannot zero pruned weights: the masks are dense, not hard.',
        ),
    ],
)
def test_actions_before_the_search_are_refused(action, message):
    masks = install_masks(net(), 0.5, BLOCK)
    with pytest.raises(RuntimeError) as error:
        action(masks)
    assert str(error.value) == message


def test_actions_out_of_turn_are_refused():
    masks = searching(net())
    state = masks.state_dict()
    with pytest.raises(RuntimeError, match='cannot begin the search: the masks are soft'):
        masks.begin(first_importance(masks), 1.0)
    with pytest.raises(RuntimeError, match='cannot load masks: the masks are soft, not dense'):
        masks.load_state_dict(state)
    with pytest.raises(RuntimeError, match='cannot zero pruned weights: the masks are soft'):
        masks.zero_pruned()
    masks.harden()
    with pytest.raises(RuntimeError, match='cannot harden the masks: the masks are hard'):
        masks.harden()
    with pytest.raises(RuntimeError, match='cannot begin the search: the masks are hard'):
        masks.begin(first_importance(masks), 1.0)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_an_importance_that_is_not_finite_is_refused(bad):
    model, stock = net(), net()
    masks = install_masks(model, 0.5, BLOCK)
    importance = first_importance(masks)
    importance[3] = bad
    with pytest.raises(ValueError, match=r'importance: expected \d+ finite .* with NaN'):
        masks.begin(importance, 1.0)
    assert masks.state == 'dense'
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters()))


def test_an_importance_of_another_length_is_refused():
    masks = install_masks(net(), 0.5, BLOCK)
    with pytest.raises(ValueError) as error:
        masks.begin(torch.zeros(masks.num_blocks + 1), 1.0)
    message = str(error.value)
    assert f'expected {masks.num_blocks} finite values, one a block' in message
    assert f'got shape ({masks.num_blocks + 1},)' in message


def test_an_importance_that_diverges_stops_the_search():
    masks = searching(net())
    with (
        pytest.raises(ValueError, match='NaN or inf usually means that training diverged'),
        masks.latent_weights(),
        torch.no_grad(),
    ):
        masks.importance[0] = math.nan


@pytest.mark.parametrize('temperature', [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused_before_anything_changes(temperature):
    model, stock = net(), net()
    masks = install_masks(model, 0.5, BLOCK)
    with pytest.raises(ValueError, match='temperature'):
        masks.begin(first_importance(masks), temperature)
    assert masks.state == 'dense'
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters()))


def test_a_sparsity_that_leaves_no_room_for_one_block_is_refused():
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError) as error:
        install_masks(model, 0.9, (4, 4))
    message = str(error.value)
    assert message.startswith('sparsity: 0.9 leaves a budget of 6.4 weights')
    assert 'smallest block (16)' in message
    assert 'Lower it, or choose smaller blocks' in message
    assert masks_of(model) is None


def test_a_sparsity_out_of_range_is_refused_before_anything_is_installed():
    model = net()
    with pytest.raises(ValueError, match=r'sparsity: 1.0 is outside \[0, 1\)'):
        install_masks(model, 1.0, BLOCK)
    assert masks_of(model) is None


# Any network


@st.composite
def chains(draw):
    """A small chain of layers that fits together, with its blocks."""
    kind = draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d]))
    widths = draw(st.lists(st.integers(1, 4).map(lambda n: 4 * n), min_size=2, max_size=4))
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        if kind is nn.Linear:
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        else:
            groups = draw(st.sampled_from([1, 2]))
            layers += [kind(inputs, outputs, 3, padding=1, groups=groups), nn.Tanh()]
    block = tuple(draw(st.sampled_from([-1, 1, 2])) for _ in range(4))
    axes = {nn.Linear: 0, nn.Conv1d: 1}.get(kind, 2)
    return nn.Sequential(*layers).double(), block, (2, widths[0], *[4] * axes)


@few
@given(
    chains(),
    st.floats(0, 0.95),
    st.floats(-3, 1).map(lambda power: 10**power),
    st.integers(0, 2**32),
)
def test_any_network_is_pruned_to_its_budget(chain, sparsity, temperature, seed):
    model, block, shape = chain
    torch.manual_seed(seed)
    try:
        masks = install_masks(model, sparsity, block)
    except ValueError as error:
        assert 'less than the smallest block' in str(error) or 'the floors of' in str(error)
        assume(False)
    masks.begin(torch.randn(masks.num_blocks), temperature)
    optimizers = optimisers(model, masks)
    for _ in range(3):
        spent = float((masks.plan.cost * masks.mask()).sum())
        assert spent == pytest.approx(masks.budget, rel=1e-6)
        model(torch.randn(shape).double()).square().mean().backward()
        with masks.latent_weights(masks.temperature / 2):
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    masks.harden()
    for _ in range(2):
        model(torch.randn(shape).double()).square().mean().backward()
        with masks.latent_weights():
            optimizers[0].step()

    pruned, kept = [], []
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            parts = hand_cut_zeros(
                state[f'{name}.weight'],
                block,
                getattr(module, 'groups', 1),
                isinstance(module, nn.ConvTranspose2d),
            )
            pruned += parts[0]
            kept += parts[1]
    total = sum(pruned) + sum(kept)
    budget = total * (1 - sparsity)
    assert sum(kept) == masks.kept_cost() <= budget * (1 + 1e-12)
    assert all(sum(kept) + block_size > budget * (1 - 1e-12) for block_size in pruned)
