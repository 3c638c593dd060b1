"""What the tests of this folder draw at random."""

import itertools

from hypothesis import strategies as st

from mmsmart.functional import Curves


@st.composite
def curves(draw, layers):
    """One function of a density a layer, rising by random steps: convex or not, flat in places."""
    points = []
    for _ in range(layers):
        inner = draw(st.lists(st.integers(1, 9), max_size=3, unique=True).map(sorted))
        steps = draw(st.lists(st.integers(0, 5), min_size=len(inner) + 2, max_size=len(inner) + 2))
        values = map(float, itertools.accumulate(steps))
        points.append(list(zip([0.0, *(x / 10 for x in inner), 1.0], values)))
    return Curves.through(points)
