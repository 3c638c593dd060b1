"""Tests of mmsmart.dependency: classes of channels that leave together."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.dependency import OUTPUT, ChannelTies, trace_ties

A, B, C = ('a', 'out'), ('b', 'in'), ('c', 'out')


def ties(**sizes):
    return ChannelTies({(name, 'out'): size for name, size in sizes.items()}, [])


def classes(group):
    """The slots of every class of a group, as `name: channels`."""
    return [
        {name: slots[i].tolist() for (name, _), slots in group.slots.items()}
        for i in range(group.size)
    ]


def test_channels_without_ties_leave_one_by_one():
    (group,) = ties(a=3).groups()
    assert group.size == 3
    assert classes(group) == [{'a': [0]}, {'a': [1]}, {'a': [2]}]


def test_tied_channels_leave_together_pair_by_pair():
    t = ChannelTies({A: 2, B: 4}, [])
    t.tie(A, [0, 0, 1, 1], B, [0, 1, 2, 3])
    (group,) = t.groups()
    assert classes(group) == [{'a': [0], 'b': [0, 1]}, {'a': [1], 'b': [2, 3]}]


def test_ties_reach_through_others():
    t = ties(a=2, b=2, c=2)
    t.tie(('a', 'out'), [0, 1], ('b', 'out'), [1, 0])
    t.tie(('c', 'out'), [0, 1], ('b', 'out'), [0, 1])
    (group,) = t.groups()
    assert classes(group) == [{'a': [0], 'b': [1], 'c': [1]}, {'a': [1], 'b': [0], 'c': [0]}]


def test_classes_on_other_sides_are_groups_of_their_own():
    t = ties(a=4, b=2)
    t.tie(('a', 'out'), [1, 3], ('b', 'out'), [0, 1])
    free, tied = t.groups()
    assert classes(free) == [{'a': [0]}, {'a': [2]}]
    assert classes(tied) == [{'a': [1], 'b': [0]}, {'a': [3], 'b': [1]}]


def test_one_that_has_to_stay_keeps_all_that_is_tied_to_it():
    t = ties(a=4, b=2, c=2)
    t.tie(('a', 'out'), [0, 1], ('b', 'out'), [0, 1])
    t.exclude(('b', 'out'), 'it is frozen')
    assert [classes(group) for group in t.groups()] == [
        [{'a': [2]}, {'a': [3]}],
        [{'c': [0]}, {'c': [1]}],
    ]
    assert t.reason(('b', 'out')) == 'it is frozen'
    assert t.reason(('a', 'out')) == 'tied to b: it is frozen'
    t.exclude(('b', 'out'), 'something else')
    assert t.reason(('b', 'out')) == 'it is frozen', 'the first reason counts'


def test_a_side_that_the_graph_does_not_have_is_passed_over():
    t = ties(a=2)
    t.exclude(('z', 'out'), 'never seen')
    assert [group.size for group in t.groups()] == [2]


def test_ties_may_be_added_after_groups_were_asked_for():
    t = ties(a=2, b=2, c=2)
    t.tie(('a', 'out'), [0, 1], ('b', 'out'), [0, 1])
    assert [group.size for group in t.groups()] == [2, 2]
    t.tie(('b', 'out'), [0, 1], ('c', 'out'), [0, 1])
    (group,) = t.groups()
    assert classes(group)[1] == {'a': [1], 'b': [1], 'c': [1]}


slots = st.tuples(st.sampled_from('abcd'), st.integers(0, 5))


@settings(max_examples=100)
@given(st.lists(st.tuples(slots, slots), max_size=20), st.sets(st.sampled_from('abcd'), max_size=2))
def test_classes_are_the_connected_parts_of_the_graph(edges, excluded):
    t = ties(a=6, b=6, c=6, d=6)
    neighbours = {(name, i): {(name, i)} for name in 'abcd' for i in range(6)}
    for (name, i), (other, j) in edges:
        t.tie((name, 'out'), [i], (other, 'out'), [j])
        merged = neighbours[name, i] | neighbours[other, j]
        for slot in merged:
            neighbours[slot] = merged
    for name in excluded:
        t.exclude((name, 'out'), 'excluded')
    expected = {frozenset(part) for part in neighbours.values()}
    expected = {part for part in expected if not {name for name, _ in part} & excluded}
    found = [
        frozenset((name, i) for name, index in slots.items() for i in index)
        for group in t.groups()
        for slots in classes(group)
    ]
    assert len(found) == len(set(found)) and set(found) == expected
    for group in t.groups():  # alike: as many slots on the same sides
        assert all(values.shape[0] == group.size for values in group.slots.values())


# Traced


def forward(net):
    return [net(torch.zeros(1, 3, 8, 8))]


def test_a_trace_knows_the_channels_of_every_layer_it_meets():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2),
        nn.Flatten(), nn.Linear(294, 5),
    )  # fmt: skip
    traced = trace_ties(net, forward)
    assert traced.size == {
        ('0', 'out'): 8, ('0', 'in'): 3, ('1', 'out'): 8, ('3', 'out'): 6, ('3', 'in'): 8,
        ('5', 'out'): 5, ('5', 'in'): 294,
    }  # fmt: skip
    assert traced.normed == {'0'}
    assert traced.reason(('5', 'out')) == OUTPUT
    # Of six channels of seven by seven positions.
    flat = next(group for group in traced.groups() if ('5', 'in') in group.slots)
    assert flat.slots['5', 'in'].tolist() == torch.arange(294).reshape(6, 49).tolist()


def test_groups_of_a_convolution_are_classes_whole():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    by_side = {tuple(group.slots): group for group in trace_ties(net, forward).groups()}
    group = by_side[('0', 'out'), ('1', 'out'), ('1', 'in'), ('2', 'in')]
    assert group.slots['0', 'out'].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert group.slots['1', 'in'].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert group.slots['1', 'out'].tolist() == [[0, 1], [2, 3]]
    assert group.slots['2', 'in'].tolist() == [[0, 1], [2, 3]]


def test_tracing_follows_frozen_layers_too():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    expected = trace_ties(net, forward).size
    assert trace_ties(net.requires_grad_(False), forward).size == expected
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_torch_pruning_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ModuleNotFoundError, match='pip install torch-pruning'):
        trace_ties(nn.Conv2d(3, 2, 1), forward)
