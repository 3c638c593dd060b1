"""The generators of a process can be put aside and back."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from mmsmart.engine.random_state import preserved_random_state, random_state, set_random_state


def draws():
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    )


def test_generators_go_on_where_they_were():
    draws()  # leaves half of a pair of normal numbers behind, in Python's and NumPy's
    state = random_state()
    first = draws()
    assert draws() != first
    set_random_state(state)
    assert draws() == first


def test_state_survives_a_checkpoint_that_is_read_without_pickles():
    random.gauss(0, 1)
    file = io.BytesIO()
    torch.save({'random_state': random_state()}, file)
    first = draws()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True)['random_state'])
    assert draws() == first


def test_preserved_state_is_put_back_even_after_an_error():
    state = random_state()
    expected = draws()
    set_random_state(state)
    try:
        with preserved_random_state():
            draws()
            raise KeyError
    except KeyError:
        pass
    assert draws() == expected
