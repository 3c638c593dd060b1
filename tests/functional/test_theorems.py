"""The paper's theorems as far as they can be checked by numbers (arXiv 2403.19969)."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsmart.functional import TemperatureSchedule, hard_topk, soft_topk


class TestTheorem31:
    """As the temperature falls to 0, the soft mask turns into the hard one."""

    @given(order=st.permutations(range(12)), kept=st.integers(1, 11), gap=st.floats(1e-3, 1e3))
    def test_soft_mask_turns_into_hard_mask(self, order, kept, gap):
        m = gap * torch.tensor(order, dtype=torch.float64)
        hard = hard_topk(m, kept)
        distances = [
            (soft_topk(m, kept, gap * relative) - hard).abs().max().item()
            for relative in (10.0, 1.0, 0.3, 0.1, 0.03, 0.01)
        ]
        assert all(after < before for before, after in itertools.pairwise(distances))
        assert distances[0] > 0.1
        # Theory: blocks next to the threshold are half a gap away, and σ(-50) = 2e-22.
        assert distances[-1] < 1e-12

    @given(
        order=st.permutations(range(8)),
        costs=st.lists(st.integers(1, 1000), min_size=8, max_size=8),
        kept=st.integers(1, 7),
    )
    def test_soft_mask_turns_into_hard_mask_with_costs(self, order, costs, kept):
        m, cost = torch.tensor(order, dtype=torch.float64), torch.tensor(costs)
        # A budget that the hard mask can meet without a rest: what the most important ones cost.
        budget = cost[m.argsort(descending=True)[:kept]].sum().item()
        hard = hard_topk(m, budget, cost)
        assert torch.equal(hard, hard_topk(m, kept))
        torch.testing.assert_close(soft_topk(m, budget, 1e-2, cost), hard, atol=1e-9, rtol=0)

    def test_rest_of_the_budget_goes_to_the_block_on_the_edge(self):
        m = torch.tensor([3.0, 2.0, 1.0])
        torch.testing.assert_close(soft_topk(m, 1.25, 1e-3), torch.tensor([1.0, 0.25, 0.0]))


PROBLEMS, SAMPLES, FEATURES, KEPT = 100, 20, 8, 3
STEPS = 300


class LeastSquares:
    """Many problems L(u) = |X u - y|² / 2 at once, small enough to try every subset of u."""

    def __init__(self, problems, generator):
        self.x = torch.randn(problems, SAMPLES, FEATURES, generator=generator).double()
        truth = torch.randn(problems, FEATURES, 1, generator=generator).double()
        noise = torch.randn(problems, SAMPLES, 1, generator=generator).double()
        self.y = self.x @ truth + 0.5 * noise

    def loss(self, u):
        return 0.5 * (self.x @ u.unsqueeze(-1) - self.y).square().sum((1, 2))

    def optimum(self, subset=slice(None)):
        """Solve for the entries of the subset, the others being 0."""
        u = self.x.new_zeros(self.x.shape[0], FEATURES)
        u[:, subset] = torch.linalg.lstsq(self.x[:, :, subset], self.y).solution.squeeze(-1)
        return u


def masks_of(importance, temperature):
    """Mask each problem by itself: soft_topk shares one budget among all it is given."""
    return torch.stack([soft_topk(m, KEPT, temperature) for m in importance])


def adam(w, m):
    # The mask has to learn faster than the weights, or they grow to make up for what it takes away.
    return torch.optim.Adam([{'params': [w], 'lr': 0.02}, {'params': [m], 'lr': 0.1}])


def sgd(w, m):
    return torch.optim.SGD([w, m], lr=0.01)


def train(problem, w, m, schedule, make_optimizer, steps=STEPS):
    """Descend L(w ⊙ f_τ(m)) in w and m together, τ following the schedule."""
    w, m = w.clone().requires_grad_(), m.clone().requires_grad_()
    optimizer = make_optimizer(w, m)
    for step in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(w * masks_of(m, schedule(step / (steps - 1)))).sum()
        loss.backward()
        optimizer.step()
    return w.detach(), m.detach()


class TestTheorem33:
    """The optimum of L(w ⊙ f_τ(m)) tends to that of the L0-constrained problem."""

    def test_annealed_optimum_is_the_best_or_second_best_subset(self):
        generator = torch.Generator().manual_seed(0)
        problem = LeastSquares(PROBLEMS, generator)
        subsets = list(itertools.combinations(range(FEATURES), KEPT))
        losses = torch.stack([problem.loss(problem.optimum(list(s))) for s in subsets], 1)

        def best_and_second(importance):
            found = [hard_topk(m, KEPT).nonzero().flatten().tolist() for m in importance]
            index = torch.tensor([subsets.index(tuple(subset)) for subset in found])
            ranks = (losses < losses.gather(1, index.unsqueeze(1))).sum(1)
            return (ranks == 0).sum().item(), (ranks == 1).sum().item()

        noise = 0.01 * torch.randn(PROBLEMS, FEATURES, generator=generator).double()
        _, m = train(problem, problem.optimum(), noise, TemperatureSchedule(1.0, 0.01), adam)
        annealed, magnitude = best_and_second(m), best_and_second(problem.optimum().abs())
        print(f'(best, second best) subset of {len(subsets)} in {PROBLEMS} problems: ')
        print(f'annealed {annealed}, by magnitude of the dense weights {magnitude}')
        # The theorem speaks of the global optimum; one descent finds it not every time.
        # Measured: (69, 15) and (59, 21) on two sets of problems; magnitude (52, 15), (49, 16).
        assert sum(annealed) >= 75
        assert sum(annealed) > sum(magnitude)


class TestTheorem37:
    """At a fixed temperature descent can stop at a point that is not sparse; a falling one escapes.

    The point: with u the dense optimum, w = u / f(m) gives w ⊙ f = u, where ∂L/∂(w ⊙ f) = 0. All
    that reaches w and m is a multiple of it.
    """

    @pytest.fixture
    def problem(self):
        return LeastSquares(20, torch.Generator().manual_seed(1))

    @pytest.fixture
    def stationary_point(self, problem):
        m = 0.5 * torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(2)).double()
        return problem.optimum() / masks_of(m, 1.0), m

    def gradients(self, problem, point, temperature):
        w, m = (part.clone().requires_grad_() for part in point)
        problem.loss(w * masks_of(m, temperature)).sum().backward()
        return w.grad.norm(dim=1), m.grad.norm(dim=1)

    def test_point_is_stationary_and_not_sparse(self, problem, stationary_point):
        mask = masks_of(stationary_point[1], 1.0)
        assert ((mask > 0.05) & (mask < 0.95)).all()
        for grad in self.gradients(problem, stationary_point, 1.0):
            assert grad.max() < 1e-10

    def test_lower_temperature_makes_both_gradients_nonzero(self, problem, stationary_point):
        for grad in self.gradients(problem, stationary_point, 0.9):
            assert grad.min() > 1e-3

    def test_falling_temperature_ends_sparse_and_lower(self, problem, stationary_point):
        hardened = {}
        for name, end in (('fixed', 1.0), ('falling', 0.01)):
            # Plain descent, as in the theorem: Adam makes a step even of a gradient of rounding.
            w, m = train(problem, *stationary_point, TemperatureSchedule(1.0, end), sgd)
            hard = torch.stack([hard_topk(each, KEPT) for each in m])
            off = (masks_of(m, end) - hard).abs().amax(1)
            hardened[name] = problem.loss(w * hard)
            if name == 'fixed':
                # Nothing has moved: still the dense optimum under a soft mask.
                torch.testing.assert_close(w, stationary_point[0], rtol=0, atol=1e-6)
                assert (off > 0.05).all()
            else:
                assert (off < 0.01).float().mean() >= 0.9
        assert (hardened['falling'] < hardened['fixed']).float().mean() >= 0.9
        assert hardened['falling'].mean() < 0.5 * hardened['fixed'].mean()
