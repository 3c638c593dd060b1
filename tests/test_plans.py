"""Tests of plans through the masks they make: budgets by resource and part, floors, N of M."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart import install_masks
from mmsmart.blocks import find_layers
from mmsmart.budget import Target
from mmsmart.cost import count_positions
from mmsmart.importance import magnitude
from mmsmart.latency import read_table
from mmsmart.plans import BlockPlan

few = settings(max_examples=60)


class Net(nn.Module):
    """Two parts and a head; the neck runs twice, the auxiliary layer in training only."""

    def __init__(self, width=10):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 14, 3, stride=2)
        )
        self.neck = nn.Conv2d(14, 14, 1)
        self.head = nn.Linear(14, 9)
        self.auxiliary = nn.Linear(14, 9)

    def forward(self, x):
        x = self.backbone(x).relu()
        x = self.neck(self.neck(x).relu()).mean((2, 3))
        return self.head(x) + (self.auxiliary(x) if self.training else 0)


TABLE = {
    'layers': [
        {'pattern': '*', 'block': 0.25, 'fixed': 0.5},
        {'pattern': 'neck', 'curve': [[0, 1.0], [0.4, 1.5], [0.5, 6.0], [1, 7.0]]},
    ]
}


def positions(model):
    counted = count_positions(model.eval(), lambda: model(torch.zeros(1, 3, 9, 9)))
    model.train()
    return counted


def net(width=10):
    torch.manual_seed(0)
    return Net(width)


def searched(model, sparsity, steps=4, seed=0, **arguments):
    """Masks after a short search with random data, budgets checked at each step."""
    masks = install_masks(
        model, sparsity, positions=positions(model), latency=read_table(TABLE), **arguments
    )
    generator = torch.Generator().manual_seed(seed)
    masks.begin(torch.randn(masks.num_blocks, generator=generator), 1.0)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.05),
        torch.optim.Adam([masks.importance], lr=0.2),
    ]
    for step in range(steps):
        assert_limits_hold(masks, masks.mask(), rel=1e-5)
        model(torch.randn(4, 3, 9, 9, generator=generator)).square().mean().backward()
        with masks.latent_weights(0.3 ** (step + 1)):
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    masks.harden()
    return masks


def assert_limits_hold(masks, mask, rel):
    """Every budget holds; of each part, one at least is met up to a block of it."""
    met = {}
    spent = masks.plan.spent(mask.double())
    following = masks.plan.next_cost(masks.importance.detach(), mask)
    for budget, now, more in zip(masks.budgets, spent, following):
        assert now <= budget.amount * (1 + rel)
        is_met = now >= budget.amount * (1 - rel) if masks.state == 'soft' else more == 0
        met.setdefault(budget.target.part, []).append(is_met or now + more > budget.amount)
    assert all(any(parts) for parts in met.values())


def counted(model, masks, resource):
    """What the zeros left of every layer, by hand."""
    uses = masks.positions
    if resource == 'params':
        return {x.name: int(x.weight.count_nonzero()) for x in masks.layers}
    return {x.name: int(x.weight.count_nonzero()) * uses[x.name] for x in masks.layers}


# Several resources


def test_of_several_budgets_all_hold_and_the_tightest_is_met():
    model = net()
    masks = searched(model, dict(params=0.5, macs=0.6, latency=0.3), block=(2, 2, 1, 1))
    assert_limits_hold(masks, masks.hard_mask(), rel=0)
    assert [x.target.resource for x in masks.budgets] == ['params', 'macs', 'latency']
    kept = masks.kept_costs()
    assert kept[0] == sum(counted(model, masks, 'params').values())
    assert kept[1] == sum(counted(model, masks, 'macs').values())


def test_a_loose_second_budget_changes_nothing():
    alone, both = net(), net()
    one = searched(alone, dict(macs=0.6), block=(2, 2, 1, 1))
    two = searched(both, dict(macs=0.6, params=0.01), block=(2, 2, 1, 1))
    assert torch.equal(one.hard_mask(), two.hard_mask())


def test_latency_is_that_of_the_table():
    model = net()
    masks = searched(model, 0.4, resource='latency', block=(2, 2, 1, 1))
    (budget,) = masks.budgets
    expected = 0.0
    for layer, kept in zip(masks.layers, masks.hard_mask().split(masks.plan.layer_sizes)):
        if layer.name == 'neck':
            density = float((layer.sizes() * kept.double()).sum() / layer.sizes().sum())
            points = [(0, 1.0), (0.4, 1.5), (0.5, 6.0), (1, 7.0)]
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                if x0 <= density <= x1:
                    value = y0 + (y1 - y0) * (density - x0) / (x1 - x0)
            expected += value
        else:
            expected += 0.5 + 0.25 * float(kept.sum())
    assert masks.kept_cost() == pytest.approx(expected, rel=1e-12)
    assert budget.amount == pytest.approx(0.6 * budget.total, rel=1e-12)
    assert masks.kept_cost() <= budget.amount < masks.kept_cost() + masks.next_block_cost()


@pytest.mark.parametrize('needed', ['macs', 'latency'])
def test_a_budget_of_what_was_not_measured_is_refused(needed):
    what = 'positions' if needed == 'macs' else 'latency'
    with pytest.raises(ValueError, match=f'{what}: a budget of {needed} needs it, got None'):
        install_masks(net(), {needed: 0.5})


TENTHS = {
    'blocks': (0.3, [dict(pattern='*', block=0.21, fixed=1.75)]),
    'curves': (0.7, [dict(pattern='0', curve=[[0, 0], [1, 6.3]]),
                     dict(pattern='1', curve=[[0, 0], [1, 0.7]])]),
    'longer curves': (0.3, [dict(pattern='0', curve=[[0, 0], [1, 9.0]]),
                            dict(pattern='1', curve=[[0, 0], [1, 1.0]])]),
}  # fmt: skip


@pytest.mark.parametrize('kind', TENTHS)
@pytest.mark.parametrize('seed', range(8))
def test_latencies_that_are_no_binary_fractions_are_met_to_a_block(kind, seed):
    torch.manual_seed(seed)
    sparsity, entries = TENTHS[kind]
    model = nn.ModuleList([nn.Linear(40, 36), nn.Linear(40, 4)])  # 90 and 10 blocks, of one price
    table = read_table(dict(layers=entries))
    masks = install_masks(model, sparsity, block=(4, 4), resource='latency', latency=table)
    masks.begin(torch.randn(masks.num_blocks), temperature=1.0)
    masks.harden()
    # Of blocks, 3.5 of the 24.5 is spent on none of them.
    assert int(masks.mask().sum()) == {'blocks': 65, 'curves': 30, 'longer curves': 70}[kind]
    assert masks.kept_cost() <= masks.budget < masks.kept_cost() + masks.next_block_cost()


def test_layers_that_a_prediction_does_not_run_stay_dense_under_macs():
    model = net()
    masks = install_masks(model, dict(params=0.5, macs=0.5), (2, 2, 1, 1),
                          positions=positions(model))  # fmt: skip
    assert [x.name for x in masks.excluded] == ['auxiliary']
    assert 'costs no MACs' in masks.excluded[0].reason


# Parts


def test_each_part_meets_its_own_budget():
    model = net()
    masks = searched(model, dict(backbone=0.75, neck=0.25), resource='params', block=(2, 2, 1, 1))
    left = counted(model, masks, 'params')
    totals = dict(backbone=10 * 27 + 14 * 90, neck=196)
    for budget, following in zip(masks.budgets, masks.next_block_costs()):
        part = budget.target.part
        kept = sum(n for name, n in left.items() if name.startswith(part))
        assert budget.total == totals[part]
        assert budget.amount == (1 - budget.target.sparsity) * totals[part]
        assert kept <= budget.amount < kept + following
    assert {x.name: x.reason for x in masks.excluded} == dict.fromkeys(
        ['head', 'auxiliary'], 'in no part that `sparsity` names'
    )
    assert masks.budget == sum(x.amount for x in masks.budgets)
    assert masks.kept_cost() == sum(left.values())


def test_parts_have_several_budgets_each():
    model = net()
    wanted = dict(backbone=dict(params=0.5, macs=0.7), neck=dict(latency=0.3))
    masks = searched(model, wanted, block=(2, 2, 1, 1))
    assert_limits_hold(masks, masks.hard_mask(), rel=0)
    assert [(x.target.part, x.target.resource) for x in masks.budgets] == [
        ('backbone', 'params'), ('backbone', 'macs'), ('neck', 'latency'),
    ]  # fmt: skip


def test_a_layer_in_two_parts_is_a_conflict():
    with pytest.raises(ValueError) as error:
        install_masks(net(), {'backbone': 0.5, 'backbone.2': 0.7}, (2, 2, 1, 1))
    assert "'backbone.2' belongs to the parts ['backbone', 'backbone.2']" in str(error.value)


def test_a_part_without_layers_is_refused():
    with pytest.raises(ValueError, match="the part 'bbox_head' holds no prunable layer"):
        install_masks(net(), dict(backbone=0.5, bbox_head=0.5), (2, 2, 1, 1))


def test_parts_resume_bit_for_bit():
    def fresh():
        model = net()
        wanted = dict(backbone=dict(params=0.5, macs=0.7), neck=0.4)
        layers = [dict(pattern='head', block='2:4')]
        arguments = dict(positions=positions(model), layers=layers)
        return model, install_masks(model, wanted, (2, 2, 1, 1), resource='params', **arguments)

    def step(model, masks, seed):
        x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        with masks.latent_weights(masks.temperature / 2):
            for weight in [*model.parameters(), masks.importance]:
                weight.data -= 0.05 * weight.grad
        for weight in model.parameters():
            weight.grad = None

    model, masks = fresh()
    masks.begin(torch.randn(masks.num_blocks), 1.0)
    step(model, masks, 0)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = masks.state_dict()
    step(model, masks, 1)
    again, other = fresh()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    step(again, other, 1)
    assert torch.equal(masks.importance, other.importance)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


# Floors


def test_every_layer_keeps_a_block_unless_allowed_to_vanish():
    model = net()
    with torch.no_grad():
        model.neck.weight.mul_(1e-3)
    masks = install_masks(model, 0.9, (2, 2, 1, 1))
    unimportant = torch.cat(
        [torch.full((n,), -9.0 if x.name == 'neck' else 1.0)
         for x, n in zip(masks.layers, masks.plan.layer_sizes)]
    )  # fmt: skip
    masks.begin(unimportant, 0.1)
    masks.harden()
    assert int(model.neck.weight.count_nonzero()) == 4
    assert 'neck' in masks.at_floor()

    vanishing = net()
    masks = install_masks(vanishing, 0.9, (2, 2, 1, 1), [dict(pattern='neck', min_density=0)])
    masks.begin(unimportant, 0.1)
    masks.harden()
    assert not bool(vanishing.neck.weight.any())
    assert 'neck' not in masks.at_floor()


def test_a_floor_holds_in_every_soft_mask_and_in_the_hard_one():
    model = net()
    rules = [dict(pattern='neck', min_density=0.6), dict(pattern='backbone.0', min_density=0.3)]
    masks = searched(model, 0.7, resource='params', block=(2, 2, 1, 1), layers=rules)
    shares = {x.name: float((x.weight != 0).float().mean()) for x in masks.layers}
    assert shares['neck'] >= 0.6 and shares['backbone.0'] >= 0.3
    assert masks.kept_cost() <= masks.budget < masks.kept_cost() + masks.next_block_cost()


def test_floors_that_leave_too_little_are_refused_with_the_numbers():
    with pytest.raises(ValueError) as error:
        install_masks(net(), 0.9, (2, 2, 1, 1), [dict(pattern='backbone', min_density=0.5)])
    message = str(error.value)
    assert 'sparsity: 0.9 leaves a budget of 197.8 weights' in message
    assert 'the floors of its 5 layers keep up to 782' in message and '`min_density`' in message


@pytest.mark.parametrize('density', [-0.1, 1.1, 'half', True])
def test_a_floor_out_of_range_is_refused(density):
    with pytest.raises(ValueError, match=r'layers\[0\].min_density: expected a share'):
        install_masks(net(), 0.5, (2, 2, 1, 1), [dict(pattern='neck', min_density=density)])


@few
@given(
    st.sampled_from(
        [
            0.5,
            dict(params=0.6, macs=0.5),
            dict(params=0.3, latency=0.6),
            dict(backbone=0.8, neck=0.6),
            dict(backbone=dict(params=0.5, macs=0.6), head=0.2, neck=dict(latency=0.5)),
        ]
    ),
    st.sampled_from(['params', 'macs', 'latency']),
    st.tuples(*[st.integers(1, 5)] * 2),
    st.lists(
        st.tuples(st.sampled_from(['*', 'neck', 'backbone.*', 'head']), st.floats(0, 1)), max_size=3
    ),
    st.integers(2, 13),
    st.integers(0, 2**32),
)
def test_limits_and_floors_hold_or_an_error_says_which_can_not(
    sparsity, resource, block, floors, width, seed
):
    model = net(width)
    rules = [dict(pattern=name, min_density=share) for name, share in floors]
    try:
        masks = searched(
            model, sparsity, 2, seed, resource=resource, block=(*block, 1, 1), layers=rules
        )
    except ValueError as error:
        assert 'leaves' in str(error) and 'budget of' in str(error)
        return
    assert_limits_hold(masks, masks.hard_mask(), rel=1e-12)
    for layer in masks.layers:
        shares = [share for name, share in floors if name in ('*', layer.name)
                  or (name == 'backbone.*' and layer.name.startswith('backbone'))]  # fmt: skip
        left = float((layer.weight != 0).double().mean())
        assert left >= shares[-1] - 1e-9 if shares else left > 0


# N of M


def groups_of(weight, m):
    """Kept weights of every group of M along the input axis."""
    rows = weight.detach().movedim(1, -1).reshape(-1, weight.shape[1])
    return [part.count_nonzero(1) for part in rows.split(m, dim=1)]


@pytest.mark.parametrize(('pattern', 'n', 'm'), [('2:4', 2, 4), ('1:4', 1, 4), ('3:8', 3, 8)])
def test_every_group_keeps_n_of_m_also_at_ragged_ends(pattern, n, m):
    model = net()
    masks = searched(model, 1 - n / m, resource='params', block=pattern)
    assert {x.name for x in masks.layers} == {
        'backbone.0', 'backbone.2', 'neck', 'head', 'auxiliary',
    }  # fmt: skip
    kept = 0
    for layer in masks.layers:
        inputs = layer.weight.shape[1]
        for i, counts in enumerate(groups_of(layer.weight, m)):
            size = min(m, inputs - i * m)
            assert bool((counts == min(n, size)).all())
            kept += int(counts.sum())
    assert kept == masks.kept_cost() == masks.budget


def test_soft_groups_keep_n_of_m_at_every_temperature():
    model = net()
    masks = install_masks(model, 0.5, '2:4')
    masks.begin(magnitude(masks.layers), 1.0)
    for temperature in (3.0, 0.1, 0.01):
        with masks.latent_weights(temperature):
            pass
        start = 0
        for layer in masks.layers:
            part = masks.mask()[start : start + layer.num_blocks].reshape(layer.weight.shape)
            start += layer.num_blocks
            sums = part.movedim(1, -1).reshape(-1, part.shape[1]).split(4, dim=1)
            for group in sums:
                wanted = torch.full((len(group),), float(min(2, group.shape[1])))
                torch.testing.assert_close(group.sum(1), wanted, rtol=1e-5, atol=1e-5)


def test_groups_of_a_grouped_and_a_transposed_convolution_run_along_their_inputs():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 3, 2), nn.Conv2d(3, 4, 1)
    )
    masks = install_masks(model, 0.5, '2:4')
    masks.begin(torch.randn(masks.num_blocks), 0.1)
    masks.harden()
    assert torch.equal(groups_of(model[0].weight, 4)[0], torch.full((8,), 2))
    transposed = model[1].weight.transpose(0, 1)
    assert all(bool((counts == 2).all()) for counts in groups_of(transposed, 4))
    assert bool((groups_of(model[2].weight, 4)[0] == 2).all())


def test_n_of_m_beside_blocks_leaves_the_budget_to_the_blocks():
    model = net()
    rules = [dict(pattern='head', block='2:4')]
    masks = searched(model, 0.6, resource='params', block=(2, 2, 1, 1), layers=rules)
    blocks, pattern = masks.budgets
    total = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1)
    assert blocks.total == total - 14 * 9 and blocks.amount == pytest.approx(0.4 * blocks.total)
    assert (pattern.target.part, pattern.amount) == ('2:4', 9 * (3 * 2 + 2))
    assert all(bool((counts == 2).all()) for counts in groups_of(model.head.weight, 4))


def test_without_a_sparsity_n_of_m_removes_what_it_removes():
    masks = install_masks(nn.Linear(8, 8), block='1:4')
    assert masks.sparsity == 0.75
    assert install_masks(nn.Linear(8, 8), block=(2, 2)).sparsity == 0.5


def test_a_sparsity_that_n_of_m_does_not_give_is_a_contradiction():
    with pytest.raises(ValueError, match=r'0\.8 contradicts the block 2:4, which removes 0\.5'):
        install_masks(net(), 0.8, '2:4')


def test_two_of_four_survives_torchs_semi_structured_conversion():
    from torch.sparse import _semi_structured_conversions as conversions

    if not hasattr(conversions, 'sparse_semi_structured_from_dense_cutlass'):
        pytest.skip('torch converts on a CPU from 2.3 on')
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 128, 3))
    masks = install_masks(model, 0.5, '2:4')
    masks.begin(magnitude(masks.layers), 0.1)
    masks.harden()
    # As a convolution over channels-last images is a matrix product.
    matrices = [model[0].weight, model[1].weight.permute(0, 2, 3, 1).reshape(128, -1)]
    for matrix in matrices:
        dense = matrix.detach().half()
        packed = conversions.sparse_semi_structured_from_dense_cutlass(dense)
        assert packed[0].shape[1] == dense.shape[1] // 2
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*packed), dense)


@few
@given(st.sampled_from([(2, 3, 1, 1), (1, 1, 1, 1), (4, -1, -1, -1)]), st.booleans())
def test_gradients_of_masked_weights_become_those_of_weights_and_masks(block, with_n_of_m):
    model = net()
    layers = [dict(pattern='neck', block='2:4')] if with_n_of_m else []
    plan = install_masks(model, 0.5, block, layers=layers).plan
    mask = torch.rand(plan.num_blocks)
    leaf = mask.double().requires_grad_()
    latent = [weight.detach().double().requires_grad_() for weight in plan.weights]
    masked = [w * f for w, f in zip(latent, plan.spread(leaf))]
    grads = [torch.randn_like(weight) for weight in plan.weights]
    torch.autograd.backward(masked[1:], [grad.double() for grad in grads[1:]])
    written = [torch.empty_like(grad) for grad in grads]
    plan.scale([w.detach().float() for w in latent], mask, out=written)
    grad_mask = plan.unmask([w.detach().float() for w in latent], [None, *grads[1:]], mask)
    for mine, theirs in zip(written, masked):
        torch.testing.assert_close(mine, theirs.detach().float())
    for mine, theirs in zip(grads[1:], latent[1:]):
        torch.testing.assert_close(mine, theirs.grad.float())
    torch.testing.assert_close(grad_mask, leaf.grad.float(), rtol=1e-5, atol=1e-5)


def test_sizes_and_costs_take_a_number_a_layer_not_one_a_block():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 33))
    positions = {'0': 1, '1': 9}
    for block, runs in (((1, 1), 2), ((4, 8), 3)):  # blocks of 4 rows leave one of 33
        layers, _ = find_layers(model, block)
        for resource in ('params', 'macs'):
            plan = BlockPlan(layers, [Target('', resource, 0.5)], positions)
            plan.follow(torch.device('cpu'))
            held = (plan.floors.sizes, plan.budgets[0].cost.cost)
            assert all(len(vector) == plan.num_blocks for vector in held)
            assert all(len(vector.values) <= runs for vector in held)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: torch sees none')
def test_two_of_four_multiplies_as_a_semi_structured_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False)).cuda()
    masks = install_masks(model, 0.5, '2:4')
    masks.begin(magnitude(masks.layers), 0.1)
    masks.harden()
    weight = model[0].weight.detach().half()
    x = torch.randn(128, 64, device='cuda').half()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    torch.testing.assert_close(torch.mm(sparse, x), torch.mm(weight, x), rtol=1e-2, atol=1e-2)
