"""Runs a block-pruned model faster on the CPU: layers skip the blocks that are zero.

    choices = mmsmart.executor.accelerate(model, images)
    print(mmsmart.executor.table(choices))

A small C++ kernel, compiled at its first use, multiplies with what is left of a weight. Each layer
uses it only where it is measured to be faster than the dense one.
"""

from .choice import Choice, accelerate, restore, table
from .kernel import KernelUnavailable

__all__ = ['Choice', 'KernelUnavailable', 'accelerate', 'restore', 'table']
