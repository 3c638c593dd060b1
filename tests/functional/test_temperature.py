"""Tests of mmsmart.functional.temperature."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsmart.functional import TemperatureSchedule, temperature_at
from mmsmart.functional.temperature import SHAPES

shapes = st.sampled_from(SHAPES)
temperatures = st.floats(1e-6, 1e3)
progresses = st.floats(0, 1)


@pytest.mark.parametrize('shape', SHAPES)
def test_schedule_runs_from_start_to_end(shape):
    schedule = TemperatureSchedule(3.0, 0.01, shape)
    assert schedule(0.0) == 3.0
    assert schedule(1.0) == 0.01


@given(shape=shapes, pair=st.tuples(temperatures, temperatures), moments=st.lists(progresses))
def test_temperature_never_rises_nor_leaves_its_range(shape, pair, moments):
    end, start = sorted(pair)
    values = [TemperatureSchedule(start, end, shape)(moment) for moment in sorted(moments)]
    assert values == sorted(values, reverse=True)
    assert all(end <= value <= start for value in values)


@pytest.mark.parametrize('shape', SHAPES)
def test_temperature_falls_strictly_where_start_is_above_end(shape):
    schedule = TemperatureSchedule(3.0, 0.01, shape)
    values = [schedule(step / 1000) for step in range(1001)]
    assert all(after < before for before, after in itertools.pairwise(values))


@given(shape=shapes, value=temperatures, progress=progresses)
def test_equal_start_and_end_fix_the_temperature(shape, value, progress):
    assert TemperatureSchedule(value, value, shape)(progress) == value


@pytest.mark.parametrize(
    ('shape', 'middle'),
    [('geometric', 0.2), ('linear', 2.005), ('cosine', 0.2)],
)
def test_middle_of_each_shape(shape, middle):
    assert math.isclose(TemperatureSchedule(4.0, 0.01, shape)(0.5), middle)


def test_cosine_falls_slowest_at_both_ends():
    schedule = TemperatureSchedule(1.0, 0.01, 'cosine')
    first, mid, last = (math.log(schedule(p) / schedule(p + 0.1)) for p in (0.0, 0.45, 0.9))
    assert math.isclose(first, last)
    assert first < 0.2 * mid


@given(shape=shapes, progress=progresses)
def test_function_and_schedule_agree(shape, progress):
    schedule = TemperatureSchedule(3.0, 0.01, shape)
    assert temperature_at(progress, 3.0, 0.01, shape) == schedule(progress)


def test_schedule_is_frozen():
    schedule = TemperatureSchedule(3.0, 0.01)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.start = 1.0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0.0, 0.01), 'start is 0.0; a temperature must be > 0'),
        ((math.inf, 0.01), 'start is inf; a temperature must be > 0 and finite'),
        ((math.nan, 0.01), 'start is nan'),
        ((1.0, 0.0), 'end is 0.0; a temperature must be > 0.*use a small one'),
        ((1.0, -1.0), 'end is -1.0'),
        ((1.0, math.nan), 'end is nan'),
        ((0.01, 3.0), 'must not rise: start is 0.01, end is 3.0'),
        ((3.0, 0.01, 'exp'), "shape is 'exp'; it must be one of geometric, linear, cosine"),
    ],
)
def test_bad_schedule_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(*arguments)


@pytest.mark.parametrize('progress', [-0.1, 1.0001, math.nan])
def test_progress_outside_its_range_is_refused(progress):
    with pytest.raises(ValueError, match=r'progress is .*; it must lie in \[0, 1\]'):
        TemperatureSchedule(3.0, 0.01)(progress)
