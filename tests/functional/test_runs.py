"""Tests of vectors held by runs: they read as the vectors that they are made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsmart.functional import Runs, solve_threshold
from mmsmart.functional.topk import hard_topk, soft_topk_vjp

# Long runs, short ones, and vectors that have none.
vectors = st.lists(st.tuples(st.sampled_from([4.0, 0.1, 7.0]), st.integers(1, 9)), min_size=1).map(
    lambda runs: torch.cat([torch.full((n,), x) for x, n in runs])
)
many = settings(max_examples=200)


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr('mmsmart.functional.runs._PART', 5)


@many
@given(vectors, st.data())
def test_it_reads_as_the_vector(x, data):
    runs = Runs.of(x)
    begin = data.draw(st.integers(0, len(x) - 1))
    part = slice(begin, begin + data.draw(st.integers(1, len(x) + 3)))
    some = torch.rand(len(x)) < 0.5
    x = x.double()
    assert torch.equal(runs.dense(), x)
    assert torch.equal(runs[part], x[part])
    assert torch.equal(runs[::3], x[::3])
    assert torch.equal(runs[some], x[some])
    assert torch.equal(runs[some.nonzero().flatten()], x[some])
    assert (len(runs), runs.shape, runs.device) == (len(x), x.shape, x.device)


@many
@given(vectors, st.data())
def test_it_is_cut_into_vectors(x, data):
    lengths = []
    while (left := len(x) - sum(lengths)) > 0:
        lengths.append(data.draw(st.integers(1, left)))
    runs, begin = Runs.of(x), 0
    for part in x.double().split(lengths):
        assert torch.equal(runs.narrow(begin, len(part)).dense(), part)
        begin += len(part)


@many
@given(vectors, st.integers(1, 12))
def test_it_is_split_into_parts_as_a_tensor_is(x, length):
    parts = zip(Runs.of(x).split(length), x.double().split(length), strict=True)
    assert all(torch.equal(one, other) for one, other in parts)


def test_parts_of_one_run_share_their_memory():
    parts = Runs.of(torch.ones(100)).split(32)
    assert [len(part) for part in parts] == [32, 32, 32, 4]
    assert len({part.data_ptr() for part in parts}) == 1


@given(vectors)
def test_its_sums_are_those_of_the_vector_bit_for_bit(x):
    f = torch.rand(len(x))
    assert torch.equal(Runs.of(x).sum(), x.double().sum())
    assert torch.equal(Runs.of(x).dot(f), (x.double() * f).sum())


def test_longer_vectors_are_summed_and_written_part_by_part(short_parts):
    x = torch.tensor([4.0, 2.0, 4.0]).repeat_interleave(torch.tensor([7, 1, 9]))
    runs = Runs.of(x)
    assert len(runs.values) == 3
    assert torch.equal(runs.dense(), x.double())
    assert (float(runs.sum()), float(runs.dot(torch.ones(17)))) == (66, 66)


def test_it_never_takes_more_than_the_vector():
    for x in (torch.arange(100.0), torch.tensor([1.0, 2.0]).repeat(50), torch.ones(100)):
        runs = Runs.of(x)
        held = [runs.values] if runs.ends is None else [runs.values, runs.ends]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) <= 8 * len(x)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 16


@many
@given(vectors, st.integers(0, 2**32), st.floats(0.05, 0.95))
def test_costs_by_run_give_the_masks_of_costs_by_block_bit_for_bit(x, seed, share):
    m, grad = torch.randn(2, len(x), generator=torch.Generator().manual_seed(seed))
    budget, x = share * float(x.double().sum()), x.double()
    runs = Runs.of(x)
    theta = solve_threshold(m, budget, 0.3, runs)
    assert torch.equal(theta, solve_threshold(m, budget, 0.3, x))
    both = [soft_topk_vjp(m, theta, 0.3, grad, cost) for cost in (runs, x)]
    assert torch.equal(*both)
    assert torch.equal(hard_topk(m, budget, runs), hard_topk(m, budget, x))


def test_costs_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match='cost ranges over'):
        solve_threshold(torch.zeros(4), 1.0, 1.0, Runs.of(torch.tensor([1.0, 1.0, 1.0, 0.0])))
