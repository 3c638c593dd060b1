"""What the tests of this folder share."""

import pytest
import torch
from hypothesis import settings

# A machine that others use too may stall any example; time is no property of the maths.
settings.register_profile('no deadline', deadline=None)
settings.load_profile('no deadline')


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
