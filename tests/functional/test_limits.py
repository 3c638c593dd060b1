"""Tests of soft and hard top-k under several limits and floors: what must hold always holds."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from functional.strategies import curves
from mmsmart.functional import (
    CurveCost,
    Curves,
    Floors,
    Limit,
    LinearCost,
    hard_topk,
    limited_topk,
    limits_mask,
    limits_vjp,
    soft_topk,
    solve_limits,
    tightest,
)

temperatures = st.floats(-4, 2).map(lambda power: 10.0**power)
many, few = settings(max_examples=150), settings(max_examples=50)


@st.composite
def problems(draw, most_blocks=6, with_curves=True):
    """Importance, limits and floors of a network of a few layers that can be met together."""
    lengths = draw(st.lists(st.integers(1, most_blocks), min_size=1, max_size=4))
    count = sum(lengths)

    def vector(strategy):
        return torch.tensor(draw(st.lists(strategy, min_size=count, max_size=count))).double()

    importance = vector(st.one_of(st.floats(-8, 8), st.sampled_from([0.0, 1.0])))
    sizes = vector(st.integers(1, 9))
    shares = draw(st.lists(st.sampled_from([0, 0, 0.1, 0.5, 1]), min_size=len(lengths),
                           max_size=len(lengths)))  # fmt: skip
    whole = torch.stack([part.sum() for part in sizes.split(lengths)])
    floors = Floors(sizes, torch.tensor(lengths), whole * torch.tensor(shares).double())

    def cost(prices):
        """Blocks of a layer cost alike, or in proportion to their weights."""
        by_layer = draw(st.lists(prices, min_size=len(lengths), max_size=len(lengths)))
        price = torch.tensor(by_layer).double().repeat_interleave(torch.tensor(lengths))
        return LinearCost(price * sizes if draw(st.booleans()) else price)

    costs = [cost(st.integers(1, 9))]
    if draw(st.booleans()):
        costs.append(cost(st.floats(0.01, 9)))
    if with_curves and draw(st.booleans()):
        layer = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        drawn = draw(curves(len(lengths)))
        alike = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=len(lengths),
                                           max_size=len(lengths)))).double()  # fmt: skip
        alike[(drawn.value[:, -1] > 0) & (drawn.value[:, -1] > drawn.value[:, 0])] = 0
        costs.append(CurveCost(alike[layer], sizes, layer, drawn))
    ones = torch.ones(count)
    limits = []
    for cost in costs:
        # A share of a layer's weights is a sum of whole blocks up to rounding.
        least, most = floors.most(cost) * (1 + 1e-12), cost.of(ones)
        assume(most > cost.of(torch.zeros(count)))
        limits.append(Limit(cost, min(least + draw(st.floats(0, 1)) * (most - least), most)))
    return importance, limits, floors


class TestSoft:
    @many
    @given(problems(), temperatures)
    def test_all_limits_and_floors_hold_and_one_limit_is_met(self, problem, temperature):
        m, limits, floors = problem
        thresholds = solve_limits(m, limits, temperature, floors)
        mask = limits_mask(m, thresholds, temperature, floors)
        shares = []
        for limit in limits:
            spent, empty = limit.cost.of(mask), limit.cost.of(torch.zeros_like(m))
            assert spent <= limit.budget + 1e-6 * max(limit.budget, 1)
            shares.append(abs(spent - limit.budget) <= 1e-5 * max(limit.budget, 1))
            # A curve that is flat, or floors that take all there is, leave nothing to meet.
            shares[-1] |= bool((mask > 1 - 1e-6).all()) or spent == empty
        assert bool((floors.kept(mask) >= floors.least * (1 - 1e-5)).all())
        free = floors.by_block(floors.kept(mask) > floors.least * (1 + 1e-5))
        assert any(shares) or not bool(free.any())

    @few
    @given(problems(with_curves=False), temperatures)
    def test_without_floors_and_with_one_limit_it_is_the_soft_topk(self, problem, temperature):
        m, (limit, *_), _ = problem
        mask = limits_mask(m, solve_limits(m, [limit], temperature), temperature)
        expected = soft_topk(m, limit.budget, temperature, limit.cost.cost.dense())
        torch.testing.assert_close(mask, expected, rtol=1e-6, atol=1e-6)

    @few
    @given(problems(), temperatures, st.floats(-20, 20))
    def test_any_guess_leads_to_the_same_mask(self, problem, temperature, start):
        m, limits, floors = problem
        masks = [
            limits_mask(m, solve_limits(m, limits, temperature, floors, guess), temperature, floors)
            for guess in (None, torch.tensor(start).double())
        ]
        torch.testing.assert_close(*masks, rtol=1e-5, atol=1e-4)

    def test_a_layer_below_its_floor_is_held_there_and_the_others_pay(self):
        m = torch.tensor([3.0, 2.0, 1.0, -5.0, -6.0]).double()
        ones = torch.ones(5).double()
        floors = Floors(ones, torch.tensor([3, 2]), torch.tensor([0.0, 1.0]).double())
        thresholds = solve_limits(m, [Limit(LinearCost(ones), 2.0)], 0.01, floors)
        assert thresholds.shape == (3,)
        assert thresholds[0] == thresholds[1] > thresholds[2]
        mask = limits_mask(m, thresholds, 0.01, floors)
        assert mask.tolist() == pytest.approx([1, 0, 0, 1, 0], abs=1e-6)

    def test_a_budget_out_of_range_is_refused(self):
        curves = Curves.through([[(0, 1.0), (1, 2.0)]])
        ones = torch.ones(2).double()
        cost = CurveCost(0 * ones, ones, torch.zeros(2, dtype=torch.long), curves)
        for budget in (0.9, 2.1):
            with pytest.raises(ValueError, match=r'budget: expected a value in \[1, 2\], got'):
                solve_limits(torch.zeros(2), [Limit(cost, budget)], 1.0)

    @pytest.mark.parametrize('bad', [math.nan, math.inf])
    def test_importance_that_is_not_finite_is_refused(self, bad):
        curves = Curves.through([[(0, 1.0), (1, 2.0)]])
        ones = torch.ones(2).double()
        cost = CurveCost(0 * ones, ones, torch.zeros(2, dtype=torch.long), curves)
        with pytest.raises(ValueError, match='every entry must be finite'):
            solve_limits(torch.tensor([0.0, bad]), [Limit(cost, 1.5)], 1.0)


class TestGradient:
    @few
    @given(problems(most_blocks=4, with_curves=False), st.floats(-1, 1), st.integers(0, 2**32))
    def test_gradient_equals_the_numerical_one_on_limits_and_floors(self, problem, power, seed):
        m, limits, floors = problem
        temperature = 10.0**power
        generator = torch.Generator().manual_seed(seed)
        m = m + torch.randn(len(m), generator=generator, dtype=torch.float64)
        grad = torch.randn(len(m), generator=generator, dtype=torch.float64)

        def solved(importance):
            return solve_limits(importance, limits, temperature, floors)

        def loss(importance):
            thresholds = solved(importance)
            return float(grad @ limits_mask(importance, thresholds, temperature, floors))

        thresholds = solved(m)
        mask = limits_mask(m, thresholds, temperature, floors)
        # At a kink, where another limit or floor takes over, there is no one derivative.
        spent = sorted(limit.cost.of(mask) / limit.budget for limit in limits if limit.budget)
        assume(len(spent) < 2 or spent[-1] - spent[-2] > 1e-3)
        near = (floors.kept(mask) - floors.least).abs()
        held = torch.zeros_like(near, dtype=torch.bool)
        if thresholds.ndim:
            held = thresholds[1:] < thresholds[0] - 1e-3 * temperature
            assume(bool((held | (thresholds[1:] == thresholds[0])).all()))
        assume(bool((held | (near > 1e-2) | (floors.least == 0)).all()))
        price = tightest(limits, mask).cost.marginal(mask)
        mine = limits_vjp(m, thresholds, temperature, grad, price, floors)
        h = 1e-5 * temperature
        steps = h * torch.eye(len(m), dtype=torch.float64)
        numerical = torch.tensor([(loss(m + e) - loss(m - e)) / (2 * h) for e in steps])
        torch.testing.assert_close(
            mine * temperature, numerical.double() * temperature, rtol=1e-3, atol=2e-4
        )

    def test_gradient_follows_the_slope_of_a_curve(self):
        m = torch.tensor([0.3, -0.2, 0.1, 0.4]).double()
        ones = torch.ones(4).double()
        curves = Curves.through(
            [[(0, 0.0), (0.1, 3.0), (1, 4.0)], [(0, 0.0), (0.9, 1.0), (1, 9.0)]]
        )
        cost = CurveCost(0.1 * ones, ones, torch.tensor([0, 0, 1, 1]), curves)
        limits, grad = [Limit(cost, 4.5)], torch.tensor([1.0, -2.0, 0.5, 3.0]).double()

        def loss(importance):
            return float(grad @ limits_mask(importance, solve_limits(importance, limits, 0.5), 0.5))

        thresholds = solve_limits(m, limits, 0.5)
        price = cost.marginal(limits_mask(m, thresholds, 0.5))
        mine = limits_vjp(m, thresholds, 0.5, grad, price)
        steps = 1e-5 * torch.eye(4, dtype=torch.float64)
        numerical = [(loss(m + e) - loss(m - e)) / 2e-5 for e in steps]
        assert mine.tolist() == pytest.approx(numerical, rel=1e-5)


class TestHard:
    @many
    @given(problems())
    def test_hard_mask_holds_everything_and_no_block_more_would_fit(self, problem):
        m, limits, floors = problem
        mask = limited_topk(m, limits, floors)
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert bool((floors.kept(mask) >= floors.least * (1 - 1e-12)).all())
        assert all(limit.cost.of(mask) <= limit.budget for limit in limits)
        for pruned in (mask == 0).nonzero().flatten():
            more = mask.index_fill(0, pruned, 1)
            assert any(limit.cost.of(more) > limit.budget for limit in limits)

    @many
    @given(problems())
    def test_increments_are_what_one_more_block_costs(self, problem):
        m, limits, _ = problem
        mask = (m > 0).double()
        for limit in limits:
            increments = limit.cost.increments(mask)
            for block in (mask == 0).nonzero().flatten():
                more = limit.cost.of(mask.index_fill(0, block, 1)) - limit.cost.of(mask)
                assert float(increments[block]) == pytest.approx(more, abs=1e-9)

    @few
    @given(problems(with_curves=False))
    def test_with_one_limit_and_no_floor_it_is_the_hard_topk(self, problem):
        m, (limit, *_), _ = problem
        cost = limit.cost.cost.dense()
        assert torch.equal(limited_topk(m, [limit]), hard_topk(m, limit.budget, cost))

    @few
    @given(problems(), st.integers(0, 2**32))
    def test_floors_never_cost_more_than_the_most_they_may(self, problem, seed):
        _, limits, floors = problem
        m = torch.randn(len(floors.sizes), generator=torch.Generator().manual_seed(seed))
        for limit in limits:
            forced = limit.cost.of(floors.forced(m).double())
            assert forced <= floors.most(limit.cost) * (1 + 1e-9)

    def test_floors_beyond_the_budget_are_refused(self):
        ones = torch.ones(4).double()
        floors = Floors(ones, torch.tensor([2, 2]), torch.tensor([2.0, 1.0]).double())
        with pytest.raises(ValueError, match=r'floors: what they keep costs 3, more than .* 2'):
            limited_topk(torch.zeros(4), [Limit(LinearCost(ones), 2.0)], floors)


def test_the_tightest_limit_is_that_with_the_largest_share_spent():
    loose = Limit(LinearCost(torch.ones(2).double()), 2.0)
    tight = Limit(LinearCost(torch.full((2,), 3.0).double()), 4.0)
    assert tightest([loose, tight], torch.tensor([1.0, 0.0])) is tight
