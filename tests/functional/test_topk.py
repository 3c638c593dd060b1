"""Tests of mmsmart.functional.topk and mmsmart.functional.threshold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from mmsmart.functional import hard_topk, soft_mask, soft_topk, soft_topk_vjp, solve_threshold
from mmsmart.functional.threshold import _solve_on_device

TEMPERATURES = [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e3]
SPARSITIES = [1e-6, 0.2, 0.5, 0.9, 1 - 1e-4]
# How far the sum of a mask may be off its budget, by the mask's dtype.
BUDGET_ERROR = {
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
    torch.float32: 1e-6,
    torch.float64: 1e-9,
}

importances = st.lists(
    st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30
)
temperatures = st.floats(-6, 3).map(lambda power: 10.0**power)
shares = st.floats(1e-6, 1 - 1e-6)


def spent(mask, cost=None):
    mask = mask.double().flatten()
    return mask.sum().item() if cost is None else torch.dot(mask, cost.double().flatten()).item()


def costs_like(importance):
    """Positive costs over six orders of magnitude, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    power = 6 * torch.rand(importance.shape, generator=generator, dtype=torch.float64)
    return (10**power).to(importance.device)


def kinds_of_importance(size):
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=generator)
    return {
        'normal': normal,
        'ties': normal.round(),
        'all equal': torch.full((size,), 0.3),
        'offset': normal + 1e3,
        'skewed': (2 * normal).exp(),
        'two clusters': normal + 100 * (normal > 0.8),
    }


class TestBudget:
    @pytest.mark.parametrize('size', [1, 2, 7, 1000, 10**5])
    @pytest.mark.parametrize('temperature', TEMPERATURES)
    def test_soft_mask_meets_budget(self, size, temperature):
        for m in kinds_of_importance(size).values():
            for cost in (None, costs_like(m)):
                total = size if cost is None else spent(torch.ones(size), cost)
                for sparsity in SPARSITIES:
                    budget = (1 - sparsity) * total
                    mask = soft_topk(m, budget, temperature, cost)
                    assert abs(spent(mask, cost) - budget) <= 1e-6 * budget

    @pytest.mark.parametrize('temperature', TEMPERATURES)
    def test_soft_mask_of_a_million_blocks_meets_budget(self, temperature):
        m = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
        cost = costs_like(m)
        assert abs(spent(soft_topk(m, 2e5, temperature)) - 2e5) <= 1e-6 * 2e5
        budget = 0.3 * cost.sum().item()
        mask = soft_topk(m, budget, temperature, cost)
        assert abs(spent(mask, cost) - budget) <= 1e-6 * budget

    def test_soft_mask_of_ten_million_blocks_meets_budget(self):
        m = torch.randn(10**7, generator=torch.Generator().manual_seed(0))
        assert abs(spent(soft_topk(m, 1e6, 0.01)) - 1e6) <= 1.0

    @given(values=importances, temperature=temperatures, share=shares)
    def test_soft_mask_meets_budget_for_any_importance(self, values, temperature, share):
        m = torch.tensor(values)
        budget = share * m.numel()
        mask = soft_topk(m, budget, temperature)
        assert abs(spent(mask) - budget) <= 1e-6 * budget

    @pytest.mark.parametrize('dtype', BUDGET_ERROR)
    def test_budget_error_is_that_of_the_dtype(self, dtype):
        m = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        mask = soft_topk(m, 300, 0.5)
        assert mask.dtype == dtype
        assert mask.shape == m.shape
        assert abs(spent(mask) - 300) <= BUDGET_ERROR[dtype] * 300

    def test_budget_may_be_a_tensor(self):
        m = torch.randn(10)
        assert torch.equal(soft_topk(m, torch.tensor(4.0), 1.0), soft_topk(m, 4.0, 1.0))

    def test_whole_number_costs_may_be_integers(self):
        m, cost = torch.randn(10), torch.arange(1, 11)
        assert torch.equal(soft_topk(m, 20, 1.0, cost), soft_topk(m, 20, 1.0, cost.double()))

    def test_budget_holds_for_far_smaller_shares_than_a_bracket_of_forty_temperatures(self):
        m = torch.randn(100, dtype=torch.float64)
        for budget in (1e-30, 1e-300):
            assert abs(spent(soft_topk(m, budget, 1.0)) - budget) <= 1e-6 * budget

    def test_smallest_and_largest_budget_between_the_ends_are_solved(self):
        m = torch.randn(3, dtype=torch.float64)
        assert spent(soft_topk(m, math.nextafter(0, 1), 1.0)) < 1e-300
        assert abs(spent(soft_topk(m, math.nextafter(3, 0), 1.0)) - 3) < 1e-12


class TestEnds:
    @pytest.mark.parametrize('shape', [(1,), (7,), (2, 3, 4), ()])
    @pytest.mark.parametrize('temperature', TEMPERATURES)
    @pytest.mark.parametrize('with_cost', [False, True])
    def test_full_and_empty_budget_are_exact_and_without_gradient(
        self, shape, temperature, with_cost
    ):
        m = torch.randn(shape, requires_grad=True)
        cost = costs_like(m) if with_cost else None
        total = m.numel() if cost is None else cost.sum().item()
        for budget, value in ((total, 1.0), (0.0, 0.0)):
            mask = soft_topk(m, budget, temperature, cost)
            assert torch.equal(mask, torch.full(shape, value))
            (grad,) = torch.autograd.grad(mask.sum(), m)
            assert torch.equal(grad, torch.zeros(shape))

    def test_budget_just_above_total_counts_as_total(self):
        cost = torch.rand(1000) + 0.1
        mask = soft_topk(torch.randn(1000), cost.double().sum() * (1 + 1e-7), 1.0, cost)
        assert torch.equal(mask, torch.ones(1000))

    def test_infinite_threshold_stands_for_the_ends(self):
        m = torch.randn(5)
        assert solve_threshold(m, 0, 1.0) == math.inf
        assert solve_threshold(m, 5, 1.0) == -math.inf


class TestGradient:
    @pytest.mark.parametrize('temperature', [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
    @pytest.mark.parametrize('with_cost', [False, True])
    @pytest.mark.parametrize('share', [0.03, 0.5, 0.95])
    def test_jacobian_equals_finite_differences(self, temperature, with_cost, share):
        generator = torch.Generator().manual_seed(0)
        # Spread over a few temperatures, so that the Jacobian is not zero; with ties.
        m = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        m[0, 1] = m[0, 0]
        m[1, 4] = m[0, 0]
        m = (2 * temperature * m + 3).requires_grad_()
        cost = costs_like(m) if with_cost else None
        budget = share * (m.numel() if cost is None else cost.sum().item())
        assert torch.autograd.gradcheck(
            lambda m: soft_topk(m, budget, temperature, cost),
            m,
            eps=1e-4 * temperature,
            atol=1e-6 / temperature,
            rtol=1e-5,
        )

    @pytest.mark.parametrize('temperature', [1e-3, 1.0, 100.0])
    def test_jacobian_of_a_single_block_is_zero(self, temperature):
        m = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        mask = soft_topk(m, 0.4, temperature)
        (grad,) = torch.autograd.grad(mask.sum(), m)
        assert abs(mask.item() - 0.4) <= 1e-12
        assert abs(grad.item()) <= 1e-12 / temperature

    def test_jacobian_is_that_of_the_closed_form(self):
        m = torch.randn(6, dtype=torch.float64)
        cost = torch.rand(6, dtype=torch.float64) + 0.5
        budget, tau = 2.0, 0.7
        f = soft_topk(m, budget, tau, cost)
        v = f * (1 - f) / tau
        expected = torch.diag(v) - torch.outer(v, cost * v) / torch.dot(cost, v)
        actual = torch.autograd.functional.jacobian(lambda m: soft_topk(m, budget, tau, cost), m)
        torch.testing.assert_close(actual, expected)

    @given(values=importances, temperature=temperatures, share=shares)
    def test_importance_moves_budget_but_does_not_change_it(self, values, temperature, share):
        m = torch.tensor(values, dtype=torch.float64)
        cost = torch.linspace(1, 100, m.numel(), dtype=torch.float64)
        theta = solve_threshold(m, share * cost.sum().item(), temperature, cost)
        grad = soft_topk_vjp(m, theta, temperature, cost, cost)
        assert grad.abs().max() <= 1e-9 * cost.max() / temperature

    @pytest.mark.parametrize('dtype', BUDGET_ERROR)
    def test_gradient_has_the_dtype_and_shape_of_importance(self, dtype):
        m = torch.randn(3, 4).to(dtype).requires_grad_()
        soft_topk(m, 5, 0.5).square().sum().backward()
        assert m.grad.dtype == dtype
        assert m.grad.shape == m.shape
        assert m.grad.isfinite().all()

    def test_float32_gradient_equals_that_of_float64(self):
        m = torch.randn(1000, dtype=torch.float64).float().double()
        grad = torch.randn(1000, dtype=torch.float64).float().double()
        theta = solve_threshold(m, 200, 0.01)
        double = soft_topk_vjp(m, theta, 0.01, grad)
        single = soft_topk_vjp(m.float(), theta, 0.01, grad.float())
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-12)

    def test_gradient_is_zero_where_the_mask_is_hard_to_the_last_bit(self):
        m = torch.tensor([3.0, 2.0, 1.0, 0.0], requires_grad=True)
        soft_topk(m, 2, 1e-6).sum().backward()
        assert torch.equal(m.grad, torch.zeros(4))

    def test_nearly_full_mask_keeps_its_gradient(self):
        # f(1 - f) taken literally in float32 would be 0 here.
        m = torch.tensor([1.0, 0.0], requires_grad=True)
        soft_topk(m, 2 - 1e-9, 1.0)[0].backward()
        assert 0 < m.grad[0] < 1e-9

    def test_soft_topk_is_made_of_the_building_blocks(self):
        m, cost, grad = torch.randn(4, 5), torch.rand(4, 5) + 0.1, torch.randn(4, 5)
        leaf = m.clone().requires_grad_()
        mask = soft_topk(leaf, 3.0, 0.2, cost)
        mask.backward(grad)
        theta = solve_threshold(m, 3.0, 0.2, cost)
        assert torch.equal(mask, soft_mask(m, theta, 0.2))
        assert torch.equal(leaf.grad, soft_topk_vjp(m, theta, 0.2, grad, cost))

    def test_autograd_through_a_mask_at_a_known_threshold_holds_it_fixed(self):
        m = torch.randn(10, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda m: soft_mask(m, 0.1, 0.5), m)

    def test_second_derivative_is_refused_not_wrong(self):
        m = torch.randn(4, requires_grad=True)
        (grad,) = torch.autograd.grad(soft_topk(m, 2, 1.0).square().sum(), m, create_graph=True)
        with pytest.raises(RuntimeError, match='once_differentiable'):
            grad.sum().backward()


class TestThreshold:
    @given(values=importances, temperature=temperatures, share=shares, start=st.floats())
    def test_any_start_leads_to_the_same_mask(self, values, temperature, share, start):
        m = torch.tensor(values)
        budget = share * m.numel()
        theta = solve_threshold(m, budget, temperature, start=start)
        assert theta.shape == ()
        assert theta.dtype == torch.float64
        mask = soft_mask(m, theta, temperature)
        assert abs(spent(mask) - budget) <= 1e-6 * budget

    def test_warm_start_takes_fewer_passes(self, monkeypatch):
        from mmsmart.functional import threshold

        passes = []
        counted = threshold._Scaled.kept
        monkeypatch.setattr(
            threshold._Scaled, 'kept', lambda x, t: passes.append(len(x.m)) or counted(x, t)
        )
        m = torch.randn(1000, generator=torch.Generator().manual_seed(0)).exp()
        theta = solve_threshold(m, 200, 0.01)
        cold = len(passes)
        solve_threshold(m, 200, 0.01, start=theta)
        assert len(passes) - cold == 1 < cold

    @pytest.mark.parametrize('kind', ['normal', 'skewed', 'two clusters'])
    def test_start_of_many_blocks_comes_from_few_of_them(self, kind, monkeypatch):
        from mmsmart.functional import threshold

        passes = []
        counted = threshold._Scaled.kept
        monkeypatch.setattr(
            threshold._Scaled, 'kept', lambda x, t: passes.append(len(x.m)) or counted(x, t)
        )
        m = kinds_of_importance(10**5)[kind]
        solve_threshold(m, 0.2 * 10**5, 0.1)
        assert passes.count(10**5) <= 4
        assert 2**12 <= min(passes) < 2**13

    @pytest.mark.filterwarnings('ignore:Warning. Profiler clears events')
    @pytest.mark.parametrize('with_cost', [False, True])
    def test_memory_on_the_way_does_not_grow_with_the_blocks(self, with_cost):
        def peak(size):
            m, grad = torch.randn(size, requires_grad=True), torch.randn(size)
            cost = torch.ones(size, dtype=torch.float64) if with_cost else None
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
                soft_topk(m, 0.2 * size, 0.1, cost).backward(grad)
            held = most = 0
            for event in run.profiler.kineto_results.events():
                if event.name() == '[memory]':
                    held += event.nbytes()
                    most = max(most, held)
            return most - 2 * 4 * size  # the mask and the gradient

        assert abs(peak(2**22) - peak(2**20)) < 2**20

    @settings(max_examples=50)
    @given(values=importances, temperature=temperatures, share=shares)
    def test_search_of_the_device_meets_budget_too(self, values, temperature, share):
        # Runs the code for GPUs on the CPU; TestOnGPU runs it where it belongs.
        m = torch.tensor(values)
        for cost in (None, costs_like(m)):
            budget = share * (m.numel() if cost is None else cost.sum().item())
            theta = _solve_on_device(m, budget, temperature, cost)
            mask = soft_mask(m, theta, temperature)
            assert abs(spent(mask, cost) - budget) <= 1e-6 * budget

    def test_search_of_the_device_works_in_chunks(self, monkeypatch):
        from mmsmart.functional import threshold

        m = torch.randn(1000)
        cost = costs_like(m)
        whole = _solve_on_device(m, 1e5, 0.1, cost)
        monkeypatch.setattr(threshold, '_CHUNK_ON_HOST', 64)
        torch.testing.assert_close(_solve_on_device(m, 1e5, 0.1, cost), whole)

    def test_working_in_parts_changes_nothing(self, monkeypatch):
        from mmsmart.functional import threshold

        m = torch.randn(1000, dtype=torch.float64)
        grad, cost, ends = torch.randn_like(m), costs_like(m), []
        for size in (2**17, 64, 1):
            monkeypatch.setattr(threshold, '_CHUNK_ON_HOST', size)
            for price in (None, cost):
                leaf = m.clone().requires_grad_()
                mask = soft_topk(leaf, 300.0, 0.1, price)
                mask.backward(grad)
                ends.append((mask.detach(), leaf.grad))
        for mine, whole in zip(ends, 3 * ends[:2]):
            torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12)

    def test_search_of_the_device_encodes_the_ends_and_keeps_nan(self):
        m = torch.randn(5)
        assert _solve_on_device(m, 0.0, 1.0, None) == math.inf
        assert _solve_on_device(m, torch.tensor(5.0), 1.0, None) == -math.inf
        assert _solve_on_device(torch.tensor([1.0, math.nan]), 1.0, 1.0, None).isnan()


def keep_one_after_the_other(importance, budget, cost):
    """Choose the blocks by the definition, with whole numbers, slow."""
    order = sorted(range(len(importance)), key=lambda i: -importance[i])
    kept, left = [0.0] * len(importance), budget
    for i in order:
        if cost[i] <= left:
            kept[i] = 1.0
            left -= cost[i]
    return kept


@st.composite
def ragged_problems(draw):
    size = draw(st.integers(1, 40))
    most = draw(st.sampled_from([3, 20, 2**40]))
    importance = draw(st.lists(st.integers(-5, 5).map(float), min_size=size, max_size=size))
    cost = draw(st.lists(st.integers(1, most), min_size=size, max_size=size))
    return importance, cost, draw(st.integers(0, sum(cost)))


class TestHard:
    @given(ragged_problems())
    def test_cost_is_below_budget_and_no_pruned_block_would_fit(self, problem):
        importance, cost, budget = problem
        mask = hard_topk(torch.tensor(importance), budget, torch.tensor(cost)).tolist()
        kept = sum(price for price, keep in zip(cost, mask) if keep)
        assert kept <= budget
        assert all(budget < kept + price for price, keep in zip(cost, mask) if not keep)

    @given(ragged_problems())
    def test_blocks_are_kept_in_order_of_importance(self, problem):
        importance, cost, budget = problem
        mask = hard_topk(torch.tensor(importance), budget, torch.tensor(cost))
        assert mask.tolist() == keep_one_after_the_other(importance, budget, cost)

    @given(values=importances, budget=st.floats(0, 1))
    def test_equal_costs_keep_as_many_as_fit(self, values, budget):
        m = torch.tensor(values)
        budget *= m.numel()
        mask = hard_topk(m, budget)
        assert mask.sum() == math.floor(budget)
        assert torch.equal(mask, hard_topk(m, budget, torch.ones(m.numel())))

    @given(values=importances, budget=st.floats(0, 1))
    def test_fractional_costs_keep_the_invariant_to_rounding(self, values, budget):
        m = torch.tensor(values)
        cost = costs_like(m)
        budget *= cost.sum().item()
        mask = hard_topk(m, budget, cost)
        rounding = 1e-12 * cost.sum().item()
        assert spent(mask, cost) <= budget + rounding
        assert (spent(mask, cost) + cost[mask == 0] > budget - rounding).all()

    def test_ties_go_to_the_lower_index(self):
        assert hard_topk(torch.zeros(5), 2).tolist() == [1, 1, 0, 0, 0]
        assert hard_topk(torch.zeros(5), 2, torch.ones(5)).tolist() == [1, 1, 0, 0, 0]

    def test_ends_keep_nothing_and_everything(self):
        m, cost = torch.randn(2, 3), torch.rand(2, 3) + 0.1
        for price in (None, cost):
            total = 6 if price is None else cost.double().sum().item()
            assert torch.equal(hard_topk(m, 0, price), torch.zeros(2, 3))
            assert torch.equal(hard_topk(m, total, price), torch.ones(2, 3))

    @pytest.mark.parametrize('dtype', BUDGET_ERROR)
    def test_mask_has_the_dtype_and_shape_of_importance(self, dtype):
        mask = hard_topk(torch.randn(3, 4).to(dtype), 5)
        assert mask.dtype == dtype
        assert mask.shape == (3, 4)
        assert mask.sum() == 5

    def test_infinite_importance_pins_a_block(self):
        m = torch.tensor([0.0, -math.inf, math.inf, 1.0])
        assert hard_topk(m, 3).tolist() == [1, 0, 1, 1]

    def test_a_million_ragged_blocks_fill_the_budget_exactly(self):
        generator = torch.Generator().manual_seed(0)
        m = torch.randn(10**6, generator=generator)
        cost = torch.randint(1, 129, (10**6,), generator=generator)
        budget = cost.sum().item() // 5
        assert spent(hard_topk(m, budget, cost), cost) == budget


ANY = torch.tensor([2.0, 1.0, 0.0])
CASES = [
    # importance, budget, temperature, cost, message
    (ANY, 1, 0.0, None, 'temperature is 0.0; it must be > 0 and finite.*use hard_topk'),
    (ANY, 1, -1.0, None, 'temperature is -1.0'),
    (ANY, 1, math.inf, None, 'temperature is inf'),
    (ANY, 1, math.nan, None, 'temperature is nan'),
    (ANY, -0.1, 1.0, None, r'budget is -0.1; it must lie in \[0, 3.0\].*give \(1 - s\) \* 3.0'),
    (ANY, 3.1, 1.0, None, r'budget is 3.1; it must lie in \[0, 3.0\]'),
    (ANY, math.nan, 1.0, None, 'budget is nan'),
    (ANY, torch.ones(3), 1.0, None, r'budget has shape \(3,\); it must be one number'),
    (ANY, 7, 1.0, torch.tensor([1, 2, 3]), r'budget is 7.0; it must lie in \[0, 6.0\]'),
    (ANY, 1, 1.0, torch.ones(2), r'(?s)same shape.*cost: +\(2,\).*importance: \(3,\)'),
    (ANY, 1, 1.0, torch.tensor([1.0, 0.0, 1.0]), r'cost ranges over \[0.0, 1.0\].*must be > 0'),
    (ANY, 1, 1.0, torch.tensor([1.0, -2.0, 1.0]), r'cost ranges over \[-2.0, 1.0\]'),
    (ANY, 1, 1.0, torch.tensor([1.0, math.nan, 1.0]), 'cost ranges over'),
    (torch.empty(0), 0, 1.0, None, r'importance is empty \(shape \(0,\)\); it needs at least one'),
    (torch.tensor([1, 2]), 1, 1.0, None, 'importance has dtype torch.int64; .*floating-point'),
]
NOT_FINITE = [[1.0, math.nan, 0.0], [1.0, math.inf, 0.0], [-math.inf, 0.0, 0.0]]


class TestErrors:
    @pytest.mark.parametrize(('importance', 'budget', 'temperature', 'cost', 'message'), CASES)
    def test_bad_argument_is_refused_by_name(self, importance, budget, temperature, cost, message):
        with pytest.raises(ValueError, match=message):
            soft_topk(importance, budget, temperature, cost)
        if not message.startswith('temperature'):
            with pytest.raises(ValueError, match=message):
                hard_topk(importance, budget, cost)

    @pytest.mark.parametrize('values', NOT_FINITE)
    def test_importance_that_is_not_finite_is_refused(self, values):
        with pytest.raises(ValueError, match=r'importance ranges over .*must be finite'):
            soft_topk(torch.tensor(values), 1, 1.0)

    def test_hard_topk_refuses_nan(self):
        with pytest.raises(ValueError, match='importance has 1 NaN of 3 entries'):
            hard_topk(torch.tensor(NOT_FINITE[0]), 1)

    def test_cost_on_another_device_is_refused(self):
        with pytest.raises(ValueError, match=r'(?s)same device.*meta.*cpu'):
            soft_topk(ANY, 1, 1.0, torch.ones(3, device='meta'))

    def test_gradient_of_another_shape_is_refused(self):
        with pytest.raises(ValueError, match=r'(?s)grad_mask.*same shape.*\(2,\).*\(3,\)'):
            soft_topk_vjp(ANY, 0.0, 1.0, torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: torch sees none')
class TestOnGPU:
    @pytest.fixture
    def forbid_waiting(self):
        torch.cuda.set_sync_debug_mode('error')
        yield
        torch.cuda.set_sync_debug_mode('default')

    @pytest.mark.parametrize('size', [1, 2, 1000, 10**6])
    @pytest.mark.parametrize('temperature', TEMPERATURES)
    def test_soft_mask_meets_budget(self, size, temperature):
        for m in kinds_of_importance(size).values():
            for cost in (None, costs_like(m).cuda()):
                total = size if cost is None else cost.sum().item()
                for sparsity in (1e-6, 0.5, 1 - 1e-4):
                    budget = (1 - sparsity) * total
                    mask = soft_topk(m.cuda(), budget, temperature, cost)
                    assert abs(spent(mask, cost) - budget) <= 1e-6 * budget

    @pytest.mark.parametrize('temperature', [1e-2, 1.0, 100.0])
    def test_gradient_equals_that_of_the_cpu(self, temperature):
        m, grad = torch.randn(2, 1000, dtype=torch.float64)
        cost = costs_like(m)
        budget = 0.3 * cost.sum().item()
        grads = []
        for device in ('cpu', 'cuda'):
            leaf = m.to(device).requires_grad_()
            mask = soft_topk(leaf, budget, temperature, cost.to(device))
            mask.backward(grad.to(device))
            grads.append(leaf.grad.cpu())
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9 / temperature)

    @pytest.mark.parametrize('dtype', BUDGET_ERROR)
    @pytest.mark.parametrize('with_cost', [False, True])
    def test_host_never_waits(self, dtype, with_cost, request):
        m = torch.randn(1000, device='cuda').to(dtype).requires_grad_()
        grad = torch.randn(1000, device='cuda').to(dtype)
        cost = costs_like(m).cuda() if with_cost else None
        budget = torch.full((), 200.0, device='cuda')
        request.getfixturevalue('forbid_waiting')
        for amount in (200.0, budget):
            mask = soft_topk(m, amount, 0.1, cost)  # a wait raises, here and below
            mask.backward(grad)
            theta = solve_threshold(m, amount, 0.1, cost)
            apart = soft_mask(m.detach(), theta, 0.1)
            pulled = soft_topk_vjp(m, theta, 0.1, grad, cost)
            # Values can't be looked at without waiting, so this is about where and what they are.
            for result in (mask, apart, pulled, m.grad):
                assert (result.device, result.dtype, result.shape) == (m.device, dtype, m.shape)

    def test_nan_gives_nan(self):
        m = torch.tensor([1.0, math.nan, 0.0], device='cuda')
        assert soft_topk(m, 1.0, 1.0).isnan().all()

    def test_hard_mask_equals_that_of_the_cpu(self):
        m, cost = torch.randn(1000), torch.randint(1, 20, (1000,))
        expected = hard_topk(m, 3000, cost)
        assert torch.equal(hard_topk(m.cuda(), 3000, cost.cuda()).cpu(), expected)
