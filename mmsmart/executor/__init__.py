"""Runs a block-pruned model faster on a CPU or a GPU: layers skip the blocks that are zero.

    choices = mmsmart.executor.accelerate(model, images)
    print(mmsmart.executor.table(choices))

A small kernel, in C++ for CPUs and in Triton for GPUs, is compiled at its first use and multiplies
with what is left of a weight. Each layer uses it only where it is measured to be faster than the
dense one.
"""

from .choice import Choice, accelerate, restore, table
from .kernel import KernelUnavailable

__all__ = ['Choice', 'KernelUnavailable', 'accelerate', 'restore', 'table']
