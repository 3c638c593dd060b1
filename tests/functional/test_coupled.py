"""Tests of mmsmart.functional.coupled against counting by hand and numerical derivatives."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from functional.strategies import curves
from mmsmart import functional
from mmsmart.functional import CoupledCost, Curves, Limit, soft_mask, soft_topk_vjp, solve_limits

temperatures = st.floats(-4, 3).map(lambda power: 10.0**power)
counts = st.integers(0, 3)


def solve_coupled_threshold(m, budget, temperature, cost, start=None):
    """θ of one budget without floors."""
    start = None if start is None else torch.as_tensor(start).double()
    return solve_limits(m, [Limit(cost, budget)], temperature, start=start)


def coupled_topk(m, budget, cost, round_to=1):
    """The hard mask of one budget, at least one block of each group."""
    least = torch.ones(cost.num_groups)
    return functional.coupled_topk(m, [Limit(cost, budget)], cost.group, least, round_to)


many, few = settings(max_examples=120), settings(max_examples=50)


@st.composite
def costs(draw, most_blocks=8, curved=False):
    """What a random network costs: groups of mixed blocks, layers between any of them."""
    sizes = draw(st.lists(st.integers(1, most_blocks), min_size=1, max_size=4))
    layers = draw(st.integers(1, 4))
    blocks = [index for index, size in enumerate(sizes) for _ in range(size)]

    def table(*shape):
        values = draw(st.lists(counts, min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(values).reshape(shape).double()

    cost = CoupledCost(
        group=torch.tensor(draw(st.permutations(blocks))),
        unit=table(layers) + 1,
        out=table(layers, len(sizes)),
        in_=table(layers, len(sizes)),
        out_rest=table(layers),
        in_rest=table(layers),
        linear=table(len(sizes)),
        constant=float(draw(counts)),
    )
    if curved and draw(st.booleans()):
        cost = replace(cost, curves=draw(curves(layers)))
    assume(cost.of(torch.ones(len(blocks))) > cost.of(torch.zeros(len(blocks))))
    return cost


@st.composite
def problems(draw):
    """A cost, an importance and a budget between nothing and everything."""
    cost = draw(costs(curved=True))
    size = len(cost.group)
    values = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0]))
    m = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64)
    empty, full = cost.of(torch.zeros(size)), cost.of(torch.ones(size))
    budget = empty + draw(st.floats(0.01, 1)) * (full - empty)
    return cost, m, min(budget, full)


def counted(cost, mask):
    """P by listing every channel of every layer, and its share."""
    mask, group = mask.tolist(), cost.group.tolist()

    def side(per_block, rest):
        shares = [1.0] * int(rest)
        for value, index in zip(mask, group):
            shares += [value] * int(per_block[index])
        return shares

    total = cost.constant + sum(value * float(cost.linear[g]) for value, g in zip(mask, group))
    for layer, unit in enumerate(cost.unit.tolist()):
        outputs = side(cost.out[layer], cost.out_rest[layer])
        inputs = side(cost.in_[layer], cost.in_rest[layer])
        left = unit * sum(a * b for a, b in itertools.product(outputs, inputs))
        if cost.curves is not None:
            whole = unit * len(outputs) * len(inputs)
            x, y = cost.curves.density[layer].numpy(), cost.curves.value[layer].numpy()
            left = float(np.interp(left / whole, x, y)) if whole else y[0]
        total += left
    return total


class TestCost:
    @few
    @given(costs(), st.integers(0, 2**32))
    def test_cost_of_a_hard_mask_is_what_counting_finds(self, cost, seed):
        mask = torch.rand(len(cost.group), generator=torch.Generator().manual_seed(seed)).round()
        assert cost.of(mask) == counted(cost, mask)

    @few
    @given(costs(curved=True), st.integers(0, 2**32))
    def test_cost_of_a_soft_mask_is_the_sum_over_all_pairs(self, cost, seed):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(cost.group), generator=generator, dtype=torch.float64)
        assert cost.of(mask) == pytest.approx(counted(cost, mask), rel=1e-12)

    @few
    @given(costs(), st.integers(0, 2**32))
    def test_marginal_cost_is_the_derivative(self, cost, seed):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(cost.group), generator=generator, dtype=torch.float64)
        step = 1e-3 * torch.eye(len(mask), dtype=torch.float64)
        # Exact for a polynomial of second degree.
        slopes = [(cost.of(mask + e) - cost.of(mask - e)) / 2e-3 for e in step]
        marginal = cost.marginal(mask)
        # What costs nothing is said to cost next to nothing.
        close = dict(rtol=1e-9, atol=2e-9 * float(marginal.max()))
        torch.testing.assert_close(marginal, torch.tensor(slopes, dtype=torch.float64), **close)
        assert bool((marginal > 0).all())

    def test_marginal_cost_follows_the_slope_of_the_curve(self):
        # Three quarters of the weights are left; there the layer gains 6 for all of them.
        steep = Curves.through([[(0, 0), (0.5, 1), (1, 4)], [(0, 0), (1, 2)]])
        cost = replace(hidden_layer(4), curves=steep)
        mask = torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
        assert cost.of(mask) == pytest.approx(2.5 + 1.5)
        assert cost.marginal(mask).tolist() == pytest.approx([6 / 4 + 2 / 4] * 4)


class TestSoftBudget:
    @many
    @given(problems(), temperatures)
    def test_soft_mask_meets_budget(self, problem, temperature):
        cost, m, budget = problem
        theta = solve_coupled_threshold(m, budget, temperature, cost)
        mask = soft_mask(m, theta, temperature)
        assert cost.of(mask) == pytest.approx(budget, rel=1e-9)

    @many
    @given(problems(), temperatures, st.one_of(st.floats(-1e4, 1e4), st.just(math.inf)))
    def test_any_guess_leads_to_the_budget(self, problem, temperature, start):
        cost, m, budget = problem
        theta = solve_coupled_threshold(m, budget, temperature, cost, start)
        assert cost.of(soft_mask(m, theta, temperature)) == pytest.approx(budget, rel=1e-9)

    @pytest.mark.parametrize('start', [math.inf, 1e4])
    def test_a_guess_at_which_nothing_costs_anything_does_no_harm(self, start):
        # P = S²: without a kept channel, a first one is free.
        one, none = torch.ones(1, 1).double(), torch.zeros(1).double()
        cost = CoupledCost(torch.tensor([0, 0]), one[0], one, one, none, none, none)
        m = torch.tensor([0.0, 1.0]).double()
        theta = solve_coupled_threshold(m, 1.0, 0.1, cost, start)
        assert cost.of(soft_mask(m, theta, 0.1)) == pytest.approx(1, rel=1e-9)

    def test_ten_thousand_channels_in_a_row_meet_budget_from_hot_to_cold(self):
        generator = torch.Generator().manual_seed(0)
        width, depth = 200, 50
        chain = torch.eye(depth).double()
        cost = CoupledCost(
            group=torch.arange(depth).repeat_interleave(width),
            unit=torch.full((depth,), 9.0).double(),
            out=chain,
            in_=chain.roll(1, 0) * (torch.arange(depth) > 0).unsqueeze(1),
            out_rest=torch.zeros(depth).double(),
            in_rest=(torch.arange(depth) == 0).double() * 3,
            linear=torch.full((depth,), 2.0).double(),
        )
        m = torch.randn(depth * width, generator=generator)
        total = cost.of(torch.ones_like(m))
        for share in (1e-3, 0.2, 0.5, 0.9, 1 - 1e-6):
            theta = None
            for temperature in (1e3, 3.0, 0.1, 1e-2, 1e-4):
                theta = solve_coupled_threshold(m, share * total, temperature, cost, theta)
                spent = cost.of(soft_mask(m.double(), theta, temperature))
                assert spent == pytest.approx(share * total, rel=1e-9)

    @given(problems(), temperatures)
    def test_the_full_budget_keeps_everything(self, problem, temperature):
        cost, m, _ = problem
        full = cost.of(torch.ones_like(m))
        theta = solve_coupled_threshold(m, full, temperature, cost)
        assert theta == -math.inf and theta.dtype == torch.float64
        assert torch.equal(soft_mask(m, theta, temperature), torch.ones_like(m))

    @given(problems(), temperatures)
    def test_a_budget_for_what_stays_anyway_keeps_nothing(self, problem, temperature):
        cost, m, _ = problem
        empty = cost.of(torch.zeros_like(m))
        theta = solve_coupled_threshold(m, empty, temperature, cost)
        assert cost.of(soft_mask(m, theta, temperature)) == pytest.approx(empty, abs=1e-9)

    @pytest.mark.parametrize('beyond', [-1e-6, 1e-6])
    def test_a_budget_out_of_range_is_refused(self, beyond):
        cost = hidden_layer(3)
        budget = beyond if beyond < 0 else 9 + beyond
        with pytest.raises(ValueError, match=r'budget: expected a value in \[0, 9\], got'):
            solve_coupled_threshold(torch.zeros(3), budget, 1.0, cost)

    def test_one_block_alone_takes_the_budget_as_its_mask(self):
        # P = 3 f: a hidden channel between one input and two outputs.
        theta = solve_coupled_threshold(torch.zeros(1), 0.75, 0.1, hidden_layer(1))
        assert float(soft_mask(torch.zeros(1).double(), theta, 0.1)) == pytest.approx(0.25)


class TestGradient:
    @few
    @given(costs(4), st.floats(0.05, 0.95), st.floats(-3, 2), st.integers(0, 2**32))
    def test_gradient_equals_the_numerical_one_on_the_budget(self, cost, share, power, seed):
        generator = torch.Generator().manual_seed(seed)
        temperature, size = 10.0**power, len(cost.group)
        m, grad = torch.randn(2, size, generator=generator, dtype=torch.float64)
        m = temperature * m
        empty, full = cost.of(torch.zeros(size)), cost.of(torch.ones(size))
        budget = empty + share * (full - empty)

        def loss(importance):
            theta = solve_coupled_threshold(importance, budget, temperature, cost)
            return float(grad @ soft_mask(importance, theta, temperature))

        theta = solve_coupled_threshold(m, budget, temperature, cost)
        price = cost.marginal(soft_mask(m, theta, temperature))
        mine = soft_topk_vjp(m, theta, temperature, grad, price) * temperature
        steps = 1e-4 * temperature * torch.eye(size, dtype=torch.float64)
        slopes = [(loss(m + e) - loss(m - e)) / 2e-4 for e in steps]
        numerical = torch.tensor(slopes, dtype=torch.float64)
        torch.testing.assert_close(mine, numerical, rtol=1e-5, atol=1e-6)
        # No step along it changes the cost.
        assert float(price @ soft_mask_slope(m, theta, temperature, price)) < 1e-12 * full


def soft_mask_slope(m, theta, temperature, price):
    """How f moves, relative to P, if all importances rise alike: not at all."""
    f = soft_mask(m, theta, temperature)
    v = f * (1 - f)
    return v * (1 - (price @ v) / (price @ v))


def hidden_layer(size):
    """Hidden channels between one input and two outputs, without biases: 3 weights each."""
    one = torch.ones(1).double()
    return CoupledCost(
        group=torch.zeros(size, dtype=torch.long),
        unit=torch.ones(2).double(),
        out=torch.tensor([[1.0], [0.0]]).double(),
        in_=torch.tensor([[0.0], [1.0]]).double(),
        out_rest=torch.tensor([0.0, 2.0]).double(),
        in_rest=torch.tensor([1.0, 0.0]).double(),
        linear=0 * one,
    )


def kept_lot_by_lot(m, budget, cost, round_to):
    """The rule in loops: first lots, then the others by falling mean, until one does not fit."""
    firsts, others = [], []
    for group in range(cost.num_groups):
        members = [i for i, g in enumerate(cost.group.tolist()) if g == group]
        members.sort(key=lambda i: -m[i])
        lots = [members[i : i + round_to] for i in range(0, len(members), round_to)]
        firsts, others = firsts + lots[:1], others + lots[1:]
    others.sort(key=lambda lot: -sum(m[i] for i in lot) / len(lot))
    kept = [i for lot in firsts for i in lot]
    for lot in others:
        mask = torch.zeros(len(m))
        mask[[*kept, *lot]] = 1
        if counted(cost, mask) > budget:
            return set(kept), set(lot)
        kept += lot
    return set(kept), set()


class TestHardMask:
    @many
    @given(problems(), st.integers(1, 5))
    def test_hard_mask_spends_as_much_as_fits(self, problem, round_to):
        cost, m, budget = problem
        try:
            mask, following = coupled_topk(m, budget, cost, round_to)
        except ValueError as error:
            assert 'Lower the sparsity' in str(error)
            assume(False)
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert not bool((mask.bool() & following).any())
        assert cost.of(mask) <= budget
        if bool(following.any()):
            assert budget < cost.of(mask + following.double())
            assert len(set(cost.group[following].tolist())) == 1
        else:
            assert bool(mask.all())
        for group in range(cost.num_groups):
            inside = cost.group == group
            count, size = int(mask[inside].sum()), int(inside.sum())
            assert count == size or (count > 0 and count % round_to == 0)
            if 0 < count < size:
                assert m[inside & mask.bool()].min() >= m[inside & ~mask.bool()].max()

    @many
    @given(costs(), st.floats(0, 1), st.integers(1, 4), st.integers(0, 2**32))
    def test_hard_mask_is_that_of_the_rule_in_loops(self, cost, share, round_to, seed):
        size = len(cost.group)
        m = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ones = torch.ones(size)
        try:
            mask, following = coupled_topk(m, share * cost.of(ones), cost, round_to)
        except ValueError:
            assume(False)
        kept, lot = kept_lot_by_lot(m.tolist(), share * cost.of(ones), cost, round_to)
        assert set(mask.nonzero().flatten().tolist()) == kept
        # Lots of one mean may be tried in any order; these have none.
        assert set(following.nonzero().flatten().tolist()) == lot

    @few
    @given(problems(), st.floats(-4, -3).map(lambda power: 10.0**power))
    def test_cold_soft_masks_are_the_hard_one_up_to_what_does_not_fit(self, problem, temperature):
        cost, m, budget = problem
        m = m + 0.1 * torch.arange(len(m))  # no ties
        assume(float(m.sort().values.diff().min() if len(m) > 1 else 1.0) > 0.02)
        theta = solve_coupled_threshold(m, budget, temperature, cost)
        mask = soft_mask(m, theta, temperature)
        undecided = (mask > 1e-6) & (mask < 1 - 1e-6)
        assert int(undecided.sum()) <= 1
        floor = cost.of((mask > 1 - 1e-6).double())
        assert floor <= budget * (1 + 1e-9) <= cost.of((mask > 1e-6).double()) * (1 + 1e-6) + 1e-6

    def test_everything_fits_a_full_budget(self):
        mask, following = coupled_topk(torch.randn(7), 21.0, hidden_layer(7), round_to=4)
        assert bool(mask.all()) and not bool(following.any())

    def test_ties_go_to_the_lower_index(self):
        mask, following = coupled_topk(torch.zeros(5), 6.0, hidden_layer(5))
        assert mask.tolist() == [1, 1, 0, 0, 0]
        assert following.tolist() == [False, False, True, False, False]

    def test_a_lot_is_as_important_as_its_blocks_on_average(self):
        # Lots (5, 1) and (4, 3) behind the first ones: 3 on average against 3.5.
        cost = CoupledCost(
            group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
            unit=torch.zeros(1).double(),
            out=torch.zeros(1, 2).double(),
            in_=torch.zeros(1, 2).double(),
            out_rest=torch.zeros(1).double(),
            in_rest=torch.zeros(1).double(),
            linear=torch.ones(2).double(),
        )
        m = torch.tensor([9.0, 9.0, 5.0, 1.0, 9.0, 9.0, 4.0, 3.0])
        mask, following = coupled_topk(m, 6.0, cost, round_to=2)
        assert mask.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
        assert following.tolist() == [False, False, True, True] + [False] * 4

    def test_a_group_of_no_importance_keeps_a_lot(self):
        cost = hidden_layer(4)
        both = CoupledCost(
            group=torch.tensor([0, 0, 1, 1]),
            unit=cost.unit,
            out=torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(),
            in_=torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double(),
            out_rest=torch.zeros(2).double(),
            in_rest=torch.tensor([1.0, 0.0]).double(),
            linear=torch.zeros(2).double(),
        )
        mask, _ = coupled_topk(torch.tensor([9.0, 8.0, -9.0, -8.0]), 4.0, both)
        assert mask.tolist() == [1, 1, 0, 1]

    def test_a_budget_below_one_lot_of_each_group_is_refused(self):
        with pytest.raises(ValueError) as error:
            coupled_topk(torch.randn(8), 11.9, hidden_layer(8), round_to=4)
        message = str(error.value)
        assert message.startswith('budget: what the floors keep in each group (at least 4 of its')
        assert '12 of 11.9' in message
        assert 'Lower the sparsity, `round_to`, or `min_density`' in message

    def test_mask_has_the_dtype_of_importance(self):
        mask, following = coupled_topk(torch.zeros(3, dtype=torch.float32), 9.0, hidden_layer(3))
        assert (mask.dtype, following.dtype) == (torch.float32, torch.bool)
