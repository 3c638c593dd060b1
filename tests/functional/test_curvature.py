"""The running mean of squared gradients, as logarithms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsmart.functional import blend_log_squares


@given(st.integers(2, 60), st.integers(0, 2**16), st.floats(-6, 6))
def test_logs_are_those_of_the_running_mean(size, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    logs, expected = torch.zeros(size), torch.zeros(size, dtype=torch.float64)
    for step in range(1, 6):
        grad = 10**exponent * torch.randn(size, generator=generator)
        mean, spread = blend_log_squares(logs, grad, 1 / step)
        expected += (grad.double().square() - expected) / step
        expected.clamp_min_(1e-8 * float(grad.double().square().mean()))
    torch.testing.assert_close(logs.double(), expected.log(), rtol=1e-4, atol=1e-4)
    assert float(mean) == pytest.approx(float(logs.mean()), rel=1e-4, abs=1e-5)
    assert float(spread) == pytest.approx(float(logs.std(unbiased=False)), rel=1e-3, abs=1e-5)


def test_long_vectors_are_blended_like_short_ones():
    grad = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    logs, short = torch.zeros(len(grad)), torch.zeros(5)
    mean, spread = blend_log_squares(logs, grad, 1.0)
    blend_log_squares(short, grad[-5:], 1.0)
    torch.testing.assert_close(logs[-5:], short)
    assert float(mean) == pytest.approx(float(logs.double().mean()), rel=1e-6)
    assert float(spread) == pytest.approx(float(logs.double().std()), rel=1e-4)


def test_gradients_may_be_in_double_precision():
    grad, logs, same = torch.tensor([1.0, -3.0, 2.0]), torch.zeros(3), torch.zeros(3)
    assert blend_log_squares(logs, grad.double(), 1.0) == blend_log_squares(same, grad, 1.0)
    assert logs.dtype == torch.float32 and torch.equal(logs, same)


def test_what_has_no_effect_counts_as_a_hundred_millionth_of_the_mean():
    logs = torch.zeros(4)
    blend_log_squares(logs, torch.tensor([0.0, 2.0, 2.0, 2.0]), 1.0)
    assert logs.tolist() == pytest.approx([math.log(3e-8)] + 3 * [math.log(4.0)])


@pytest.mark.parametrize('value', [0.0, 3.0])
def test_where_all_squares_are_the_same_nothing_stands_out(value):
    logs = torch.zeros(1000)
    mean, spread = blend_log_squares(logs, torch.full((1000,), value), 1.0)
    assert bool(((logs - mean) / spread == 0).all())


@pytest.mark.parametrize('broken', [math.inf, -math.inf, math.nan])
def test_a_broken_gradient_changes_nothing(broken):
    logs = torch.zeros(3)
    expected = blend_log_squares(logs, torch.tensor([1.0, 2.0, 3.0]), 1.0)
    before = logs.clone()
    found = blend_log_squares(logs, torch.tensor([1.0, broken, 3.0]), 0.5)
    assert torch.equal(logs, before) and found == expected
