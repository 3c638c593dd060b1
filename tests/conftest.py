"""Settings of all tests."""

import torch
from hypothesis import settings

# Tensors here are tiny: on a machine that others use too, threads wait for each other (measured:
# a search of 40 steps in 15 s with two threads, in 0.2 s with one).
torch.set_num_threads(1)

# Such a machine may stall any example; time is no property of what is tested.
settings.register_profile('no deadline', deadline=None)
settings.load_profile('no deadline')
