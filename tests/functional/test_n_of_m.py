"""Tests of N of M: every row has a soft and a hard top-k of its own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsmart.functional import (
    hard_topk,
    rows_mask,
    rows_topk,
    rows_vjp,
    soft_topk,
    soft_topk_vjp,
    solve_row_thresholds,
    solve_threshold,
)

temperatures = st.floats(-5, 3).map(lambda power: 10.0**power)
many = settings(max_examples=100)


@st.composite
def rows(draw, ragged=False):
    """Importance `(rows, m)`, N, and which entries are there."""
    m, n = draw(st.integers(2, 9)), draw(st.integers(1, 8))
    count = draw(st.integers(1, 5))
    values = st.one_of(st.floats(-50, 50), st.sampled_from([0.0, 1.0]))
    flat = draw(st.lists(values, min_size=count * m, max_size=count * m))
    importance = torch.tensor(flat, dtype=torch.float64).reshape(count, m)
    lengths = [draw(st.integers(1, m)) if ragged else m for _ in range(count)]
    valid = torch.arange(m) < torch.tensor(lengths).unsqueeze(1)
    return importance, min(n, m - 1), valid


@many
@given(rows(ragged=True), temperatures)
def test_every_soft_row_keeps_n_or_all_that_is_there(problem, temperature):
    importance, n, valid = problem
    thresholds = solve_row_thresholds(importance, n, temperature, valid)
    mask = rows_mask(importance, thresholds, temperature, valid)
    wanted = valid.sum(1).clamp_max(n).double()
    torch.testing.assert_close(mask.sum(1), wanted, rtol=1e-6, atol=0)
    assert bool((mask[~valid] == 0).all())


@many
@given(rows(), temperatures)
def test_a_row_is_the_soft_topk_of_its_entries(problem, temperature):
    importance, n, _ = problem
    mask = rows_mask(importance, solve_row_thresholds(importance, n, temperature), temperature)
    for row, m in zip(mask, importance):
        torch.testing.assert_close(row, soft_topk(m, float(n), temperature), rtol=1e-4, atol=1e-6)


@many
@given(rows(ragged=True), temperatures, st.integers(0, 2**32))
def test_gradients_are_those_of_the_soft_topk_of_each_row(problem, temperature, seed):
    importance, n, valid = problem
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(importance.shape, generator=generator, dtype=torch.float64)
    thresholds = solve_row_thresholds(importance, n, temperature, valid)
    mine = rows_vjp(importance, thresholds, temperature, grad, valid)
    for i in range(len(importance)):
        there = valid[i]
        if int(there.sum()) <= n:
            assert not bool(mine[i].any())
            continue
        theta = solve_threshold(importance[i][there], float(n), temperature)
        expected = soft_topk_vjp(importance[i][there], theta, temperature, grad[i][there])
        close = dict(rtol=1e-3, atol=1e-6 / temperature)
        torch.testing.assert_close(mine[i][there], expected, **close)
        assert not bool(mine[i][~there].any())


@many
@given(rows(ragged=True), temperatures, st.floats(-1e3, 1e3))
def test_any_guess_leads_to_the_same_rows(problem, temperature, start):
    importance, n, valid = problem
    guess = torch.full((len(importance),), start, dtype=torch.float64)
    masks = [
        rows_mask(importance, solve_row_thresholds(importance, n, temperature, valid, g),
                  temperature, valid)
        for g in (None, guess)
    ]  # fmt: skip
    torch.testing.assert_close(*masks, rtol=1e-4, atol=1e-5)


@many
@given(rows(ragged=True))
def test_every_hard_row_keeps_the_n_most_important_that_are_there(problem):
    importance, n, valid = problem
    mask = rows_topk(importance, n, valid)
    for m, row, there in zip(importance, mask, valid):
        count = float(min(n, int(there.sum())))
        assert torch.equal(row[there], hard_topk(m[there], count))
        assert not bool(row[~there].any())


def test_many_rows_are_solved_in_chunks_alike(monkeypatch):
    from mmsmart.functional import n_of_m

    importance = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    whole = solve_row_thresholds(importance, 2, 0.1)
    monkeypatch.setattr(n_of_m, '_CHUNK', 7)
    torch.testing.assert_close(solve_row_thresholds(importance, 2, 0.1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_importance_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match='importance is not finite'):
        solve_row_thresholds(torch.tensor([[0.0, bad]]), 1, 1.0)


@pytest.mark.parametrize(('shape', 'keep'), [((4,), 1), ((2, 4), 0)])
def test_a_wrong_shape_or_count_is_refused(shape, keep):
    with pytest.raises(ValueError, match='expected importance of shape'):
        solve_row_thresholds(torch.zeros(shape), keep, 1.0)
