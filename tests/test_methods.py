"""Methods decide which blocks stay, as their papers say; whatever they decide, the budget holds."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from mmsmart import install_masks
from mmsmart.importance import magnitude
from mmsmart.methods import METHODS
from mmsmart.methods.method import cubic, within_layers

GRADUAL = [name for name, method in METHODS.items() if not method.one_shot]
ONE_SHOT = [name for name, method in METHODS.items() if method.one_shot]
STEPS = 24


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 8, generator=generator) for _ in range(count)]


def first_of(masks):
    generator = torch.Generator().manual_seed(2)
    if masks.method.init == 'zero':
        return torch.zeros(masks.num_blocks)
    return torch.randn(masks.num_blocks, generator=generator)


class Search:
    """A search that shows its masks: SGD without momentum, so that steps are easily told."""

    def __init__(self, method, sparsity=0.75, momentum=0.0, **installed):
        self.model = network()
        self.masks = install_masks(
            self.model, sparsity=sparsity, block=(2, 2), method=method, **installed
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=momentum)
        self.importance = torch.optim.SGD([self.masks.importance], lr=0.1)
        self.masks.begin(first_of(self.masks), temperature=1.0)

    def step(self, images, progress):
        masks = self.masks
        self.model(images).square().mean().backward()
        masks.method.progress = progress
        with masks.latent_weights(10 ** (-2 * progress)):
            self.optimizer.step()
            if masks.state == 'soft' and masks.method.learns:
                self.importance.step()
        self.optimizer.zero_grad()

    def run(self, steps=STEPS):
        shown = [self.masks.mask()]
        for count, images in enumerate(batches(steps)):
            self.step(images, (count + 1) / steps)
            shown.append(self.masks.mask())
        return shown


def latent(search):
    return [weight.clone() for weight in search.masks.state_dict()['latent']]


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('sparsity', [0.0, 0.5, 0.9])
def test_every_method_ends_on_budget(name, sparsity):
    search = Search(METHODS[name](), sparsity)
    search.run()
    masks = search.masks
    if masks.state == 'soft':
        masks.harden()
    zeros = sum(int((layer.weight == 0).sum()) for layer in masks.layers)
    assert masks.total_cost - zeros == masks.kept_cost() <= masks.budget
    if sparsity:
        assert masks.kept_cost() + masks.next_block_cost() > masks.budget
        assert zeros > 0


@pytest.mark.parametrize('name', ONE_SHOT)
def test_a_one_shot_method_is_hard_at_once(name):
    search = Search(METHODS[name]())
    assert search.masks.state == 'hard'
    first, *_, last = search.run(3)
    assert torch.equal(first, last)


@pytest.mark.parametrize('name', ['uniform', 'wanda', 'movement', 'agp', 'sequential_attention'])
def test_a_method_by_layers_removes_the_same_share_of_each(name):
    search = Search(METHODS[name]())
    search.run()
    kept = search.masks.hard_mask().split(search.masks.plan.layer_sizes)
    assert all(abs(float(part.mean()) - 0.25) <= 1 / len(part) for part in kept)


def test_scopes_differ():
    kept = []
    for scope in ('layer', 'network'):
        search = Search(METHODS['agp'](interval=1, scope=scope))
        search.run()
        kept.append(search.masks.hard_mask())
    assert not torch.equal(*kept)


def test_ranks_lie_evenly_within_each_layer():
    search = Search(METHODS['uniform'](), sparsity=0.5)
    ranks = within_layers(search.masks.plan, torch.randn(search.masks.num_blocks))
    for part in ranks.split(search.masks.plan.layer_sizes):
        expected = (torch.arange(len(part)) + 0.5) / len(part)
        torch.testing.assert_close(part.sort().values, expected)


@pytest.mark.parametrize('name', ['agp', 'movement'])
def test_sparsity_grows_along_the_cubic_ramp(name):
    search = Search(METHODS[name](interval=1))
    shown = search.run()
    blocks = search.masks.num_blocks
    for count, mask in enumerate(shown):
        assert abs(float(1 - mask.mean()) - 0.75 * cubic(count / STEPS)) <= 1 / blocks
        assert set(mask.tolist()) <= {0.0, 1.0}


def test_gradual_masks_change_at_their_interval_only():
    shown = Search(METHODS['agp'](interval=4)).run()
    changed = [i for i in range(1, len(shown)) if not torch.equal(shown[i], shown[i - 1])]
    assert changed == [4, 8, 12, 16, 20, 24] or set(changed) <= {4, 8, 12, 16, 20, 24}
    assert changed


def test_what_agp_removed_keeps_its_weights_and_may_come_back():
    search = Search(METHODS['agp'](interval=1, scope='network'))
    search.step(batches(1)[0], 0.5)
    gone = search.masks.mask() == 0
    before = latent(search)
    search.step(batches(1)[0], 0.5)
    for layer, old, new, part in zip(
        search.masks.layers, before, latent(search), gone.split(search.masks.plan.layer_sizes)
    ):
        where = layer.expand(part.float()).bool()
        assert torch.equal(old[where], new[where]) and bool((old[where] != 0).any())
    # Grown by hand beyond all others, a removed block is back with the next mask.
    block = int(gone.float().argmax())
    layer, weights = search.masks.layers[0], search.masks._latent[0]
    assert block < layer.num_blocks
    weights += 100 * layer.expand(torch.eye(layer.num_blocks)[block])
    search.step(batches(1)[0], 0.5)
    assert search.masks.mask()[block] == 1


def test_taylor_removes_for_good_what_matters_least():
    search = Search(METHODS['taylor'](interval=3, momentum=0.5))
    shown = search.run()
    for before, after in pairwise(shown):
        assert bool((after <= before).all())


def test_taylor_scores_are_squares_of_summed_products_averaged():
    search = Search(METHODS['taylor'](interval=2, momentum=0.5), sparsity=0.5)
    squares = []
    for images in batches(4):
        twin = copy.deepcopy(search.model)
        twin.zero_grad()
        twin(images).square().mean().backward()
        layers = [twin[0], twin[2], twin[4]]
        products = [x.weight.detach() * x.weight.grad for x in layers]
        squares.append(torch.cat([y.reduce(p) for y, p in zip(search.masks.layers, products)]) ** 2)
        search.step(images, 0.0)
    means = [(squares[0] + squares[1]) / 2, (squares[2] + squares[3]) / 2]
    expected = 0.5 * means[0] + 0.5 * means[1]
    torch.testing.assert_close(search.masks.method.average, expected, rtol=1e-4, atol=1e-9)


def test_taylor_that_never_cut_decides_by_what_it_has_seen():
    search = Search(METHODS['taylor'](interval=100))
    search.run(10)
    twin = Search(METHODS['taylor'](interval=10))
    twin.run(10)  # whose first cut, after the last step, has seen the same
    masks = search.masks
    masks.harden()
    assert torch.equal(masks.mask(), twin.masks.hard_mask())


def test_taylor_leaves_out_a_gradient_that_overflows():
    search, clean = (Search(METHODS['taylor'](interval=4)) for _ in range(2))
    for count, images in enumerate(batches(4)):
        clean.step(images, count / 8)
        search.step(images, count / 8)
    overflow = torch.full((search.masks.num_blocks,), torch.inf)
    search.masks.method.backward(search.masks.plan, search.masks.importance, overflow)
    for count, images in enumerate(batches(4)):
        clean.step(images, 0.5 + count / 8)
        search.step(images, 0.5 + count / 8)
    assert torch.equal(search.masks.method.average, clean.masks.method.average)
    assert torch.equal(search.masks.mask(), clean.masks.mask())


def test_curvature_leaves_out_a_first_gradient_that_overflows():
    search, clean = (Search(METHODS['smart'](curvature=1.0)) for _ in range(2))
    for masks in (search.masks, clean.masks):
        masks.importance.data.zero_()
    overflow = torch.full((search.masks.num_blocks,), torch.inf)
    gradients = 1e-3 * torch.randn(3, search.masks.num_blocks)
    search.masks.method.backward(search.masks.plan, search.masks.importance, overflow)
    for gradient in gradients:
        for masks in (search.masks, clean.masks):
            masks.method.backward(masks.plan, masks.importance, gradient)
    torch.testing.assert_close(search.masks.importance, clean.masks.importance)


def test_movement_scores_step_against_the_product_of_weight_and_gradient():
    search = Search(METHODS['movement']())
    images = batches(1)[0]
    search.step(images, 0.3)
    before, weights = search.masks.importance.detach().clone(), latent(search)
    grads = torch.autograd.grad(
        search.model(images).square().mean(), [layer.weight for layer in search.masks.layers]
    )
    search.step(images, 0.3)
    moved = [y.reduce(w * g) for y, w, g in zip(search.masks.layers, weights, grads)]
    torch.testing.assert_close(search.masks.importance.detach(), before - 0.1 * torch.cat(moved))


def test_acdc_alternates_and_regrows_from_zero():
    search = Search(METHODS['acdc'](phases=4), momentum=0.9)
    sparse, restarts = [], []
    for count, images in enumerate(batches(STEPS)):
        search.step(images, (count + 1) / STEPS)
        sparse.append(bool((search.masks.mask() == 0).any()))
        restarts.append(search.masks.method.restarted)
        if restarts[-1]:  # dense again: what was pruned begins at zero
            zeros = sum(int((weight == 0).sum()) for weight in latent(search))
            assert zeros == pytest.approx(0.75 * search.masks.total_cost, abs=4)
    assert sparse == [True] * 5 + [False] * 6 + [True] * 6 + [False] * 7
    assert [i for i, restart in enumerate(restarts) if restart] == [5, 17]


def test_pdp_masks_are_logistic_in_squares_around_a_threshold_of_each_layer():
    search = Search(METHODS['pdp'](tau=1e-2), sparsity=0.5)
    search.run(5)
    masks = search.masks
    parts = masks.mask().split(masks.plan.layer_sizes)
    for layer, weight, part, density in zip(
        masks.layers, latent(search), parts, masks.method.densities
    ):
        norms = (layer.reduce(weight.square()) / layer.sizes()).sqrt().sort(descending=True).values
        kept = round(float(density) * len(norms))
        t = (norms[kept - 1] + norms[kept]) / 2
        expected = torch.sigmoid((norms.square() - t.square()) / 1e-2)
        torch.testing.assert_close(part.sort(descending=True).values, expected)
        assert int((part > 0.5).sum()) == kept


def test_pdp_weights_get_the_gradient_of_their_mask_too():
    search = Search(METHODS['pdp'](tau=1e-2), sparsity=0.5)
    images = batches(1)[0]
    search.step(images, 0.5)
    method, layers = search.masks.method, search.masks.layers
    weights = [weight.requires_grad_() for weight in latent(search)]
    masked = {}
    for i, (layer, weight) in enumerate(zip(layers, weights)):
        squares = layer.reduce(weight.square()) / layer.sizes()
        threshold = method.squared.split(search.masks.plan.layer_sizes)[i]
        masked[f'{2 * i}.weight'] = weight * layer.expand(((squares - threshold) / 1e-2).sigmoid())
    loss = torch.func.functional_call(search.model, masked, images).square().mean()
    expected = [w - 0.05 * g for w, g in zip(weights, torch.autograd.grad(loss, weights))]
    search.step(images, 0.5)
    for one, other in zip(latent(search), expected):
        torch.testing.assert_close(one, other.detach())


def test_sequential_attention_is_a_softmax_in_each_layer_times_its_blocks():
    search = Search(METHODS['sequential_attention'](cycles=1))
    search.masks.importance.data = torch.randn(search.masks.num_blocks)
    mask = search.masks.mask()
    density = search.masks.method.density
    assert density == pytest.approx(0.25, abs=0.05)
    for part, logits in zip(
        mask.split(search.masks.plan.layer_sizes),
        search.masks.importance.detach().split(search.masks.plan.layer_sizes),
    ):
        softmax = len(part) * logits.exp() / logits.exp().sum()
        torch.testing.assert_close(part, softmax.clamp(density, 1 / density))


def test_sequential_attention_leaves_trains_on_and_returns():
    search = Search(METHODS['sequential_attention'](cycles=1), momentum=0.9)
    kept = [float((mask > 0).float().mean()) for mask in search.run(70)]
    # 10 of 35 parts dense, three phases of 10/3, 15 in which blocks leave.
    assert kept[:20] == [1.0] * 20
    ramp, held, dense, last = kept[21:26], kept[27:33], kept[34:39], kept[42:]
    assert ramp == sorted(ramp, reverse=True) and ramp[-1] < ramp[0]
    assert len(set(held)) == 1 and held[0] < 0.35
    assert set(dense) == {1.0}
    assert last == sorted(last, reverse=True) and last[-1] == pytest.approx(0.25, abs=0.03)


def test_sequential_attention_ends_in_the_weights():
    search = Search(METHODS['sequential_attention'](cycles=1))
    search.run()
    mask, before = search.masks.mask(), [layer.weight.clone() for layer in search.masks.layers]
    search.masks.harden()
    for layer, old in zip(search.masks.layers, before):
        torch.testing.assert_close(layer.weight.detach(), old)
    assert not torch.equal(mask, mask.round())


def test_tied_importance_follows_the_weights_and_moves_them():
    search = Search(METHODS['smart'](tied=True))
    free = Search(METHODS['smart']())
    search.run(4)
    free.run(4)
    with_weights = torch.cat(
        [y.reduce(w.abs()) / y.sizes() for y, w in zip(search.masks.layers, latent(search))]
    )
    first = search.masks.plan.layer_sizes[0]
    order = search.masks.importance.detach()[:first].argsort()
    assert torch.equal(order, with_weights[:first].argsort())
    assert search.masks.importance.grad is None
    assert not torch.equal(latent(search)[0], latent(free)[0])


def test_tied_gradient_is_that_of_the_whole_function_of_the_weights():
    """In float64, against a derivative by differences."""
    torch.set_default_dtype(torch.float64)
    try:
        search = Search(METHODS['smart'](tied=True), sparsity=0.5)
        images = batches(1)[0].double()
        search.step(images, 0.0)
        weights = latent(search)

        def loss_at(values):
            masks = install_masks(
                twin := network(), 0.5, (2, 2), method=METHODS['smart'](tied=True)
            )
            twin.load_state_dict(search.model.state_dict())
            for layer, value in zip(masks.layers, values):
                layer.weight.data = value.clone()
            masks.begin(magnitude(masks.layers), temperature=1.0)
            return twin(images).square().mean().item()

        search.step(images, 0.0)
        stepped = latent(search)
        for index in [(0, (3, 4)), (1, (5, 7)), (2, (2, 2))]:
            which, at = index
            ends = []
            for sign in (1, -1):
                values = [weight.clone() for weight in weights]
                values[which][at] += sign * 1e-3
                ends.append(loss_at(values))
            slope = (ends[0] - ends[1]) / 2e-3
            step = (stepped[which][at] - weights[which][at]) / -0.05
            assert float(step) == pytest.approx(slope, rel=2e-2, abs=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', GRADUAL)
def test_a_search_goes_on_from_its_state_bit_for_bit(name):
    through = Search(METHODS[name]())
    half = Search(METHODS[name]())
    images = batches(STEPS)
    for count in range(STEPS // 2):
        half.step(images[count], (count + 1) / STEPS)
        through.step(images[count], (count + 1) / STEPS)
    resumed = Search.__new__(Search)
    resumed.model = network()
    resumed.model.load_state_dict(half.model.state_dict())
    resumed.masks = install_masks(resumed.model, 0.75, (2, 2), method=METHODS[name]())
    resumed.masks.load_state_dict(copy.deepcopy(half.masks.state_dict()))
    resumed.optimizer = torch.optim.SGD(resumed.model.parameters(), lr=0.05)
    resumed.importance = torch.optim.SGD([resumed.masks.importance], lr=0.1)
    for search in (through, resumed):
        for count in range(STEPS // 2, STEPS):
            search.step(images[count], (count + 1) / STEPS)
    assert torch.equal(through.masks.mask(), resumed.masks.mask())
    for one, other in zip(latent(through), latent(resumed)):
        assert torch.equal(one, other)


def test_state_of_another_method_is_refused():
    state = Search(METHODS['agp']()).masks.state_dict()
    masks = install_masks(network(), 0.75, (2, 2), method=METHODS['movement']())
    with pytest.raises(ValueError, match=r'other method .*AGP.* there, Movement'):
        masks.load_state_dict(state)


@pytest.mark.parametrize(
    ('name', 'setting', 'value'),
    [
        ('agp', 'interval', 0),
        ('agp', 'scope', 'block'),
        ('movement', 'scope', None),
        ('taylor', 'momentum', 1.0),
        ('pdp', 'tau', 0.0),
        ('acdc', 'phases', 3),
        ('sequential_attention', 'cycles', 0),
        ('sequential_attention', 'steepness', 'steep'),
        ('smart', 'tied', 1),
        ('smart', 'curvature', -0.5),
        ('smart', 'scope', 'block'),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_key(name, setting, value):
    with pytest.raises(ValueError, match=rf'smart\.method_cfg\.{setting}: got {value!r}'):
        METHODS[name](**{setting: value})


def test_smart_by_layers_meets_the_budget_in_each():
    search = Search(METHODS['smart'](scope='layer'))
    masks = search.masks
    for mask in search.run():
        for part, layer in zip(mask.split(masks.plan.layer_sizes), masks.layers):
            kept = float((part * layer.sizes()).sum()) / layer.weight.numel()
            assert kept == pytest.approx(0.25, rel=1e-5)
    kept = masks.hard_mask().split(masks.plan.layer_sizes)
    assert all(abs(float(part.mean()) - 0.25) <= 1 / len(part) for part in kept)


def test_smart_by_layers_refuses_what_has_no_layers_of_its_own():
    with pytest.raises(ValueError, match=r"smart\.method_cfg\.scope: 'layer'"):
        Search(METHODS['smart'](scope='layer'), sparsity={'0': 0.5, '2': 0.5})


def recorded(method):
    """The gradients of the mask that a method is given, from now on."""
    grads, inner = [], method.backward

    def backward(plan, importance, grad_mask):
        grads.append(grad_mask.clone())
        inner(plan, importance, grad_mask)

    method.backward = backward
    return grads


def test_the_importance_follows_the_logarithm_of_the_mean_squared_gradient():
    search = Search(METHODS['smart'](curvature=0.5))
    search.importance = torch.optim.SGD([search.masks.importance], lr=0.0)
    first = search.masks.importance.detach().clone()
    grads = recorded(search.masks.method)
    search.run()
    squares = torch.zeros_like(first)
    for step, grad in enumerate(grads, 1):  # fewer steps than it looks back on
        squares += (grad.square() - squares) / step
        squares.clamp_min_(1e-8 * float(grad.square().mean()))  # a dead unit has no gradient
    score = squares.log()
    expected = 0.5 * (score - score.mean()) / score.std(unbiased=False)
    torch.testing.assert_close(search.masks.importance - first, expected, atol=1e-4, rtol=1e-4)


def test_old_gradients_are_forgotten_by_the_curvature():
    search = Search(METHODS['smart'](curvature=1.0))
    method, masks = search.masks.method, search.masks
    for count in range(700):
        loud = torch.arange(masks.num_blocks) % 2 == (count < 100)
        method.backward(masks.plan, masks.importance, torch.where(loud, 10.0, 1.0))
    squares = method.log_squares.exp()
    assert bool((squares[::2] > 99).all() and (squares[1::2] < 2).all())


def test_an_overflow_leaves_the_curvature_as_it_is():
    search = Search(METHODS['smart'](curvature=1.0))
    search.run(3)
    method, masks = search.masks.method, search.masks
    importance, logs = masks.importance.detach().clone(), method.log_squares.clone()
    broken = torch.ones(masks.num_blocks)
    broken[0] = torch.inf
    method.backward(masks.plan, masks.importance, broken)
    assert torch.equal(method.log_squares, logs)
    torch.testing.assert_close(masks.importance.data, importance)


def test_smart_without_a_temperature_is_refused():
    masks = install_masks(network(), 0.5, (2, 2))
    with pytest.raises(ValueError, match='temperature'):
        masks.begin(torch.zeros(masks.num_blocks))
