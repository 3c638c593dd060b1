"""Pruning methods that a config can name: SMART, and those it is compared with.

All of them share blocks, budgets, stages, data and the last cut; each says in its docstring where
it comes from and what its authors' defaults are.
"""

from mmsmart.methods.acdc import ACDC
from mmsmart.methods.agp import AGP
from mmsmart.methods.method import Method
from mmsmart.methods.movement import Movement
from mmsmart.methods.one_shot import Magnitude, Random, Uniform, Wanda
from mmsmart.methods.pdp import PDP
from mmsmart.methods.sequential_attention import SequentialAttention
from mmsmart.methods.smart import Smart
from mmsmart.methods.taylor import Taylor

METHODS: dict[str, type[Method]] = {
    'smart': Smart,
    'magnitude': Magnitude,
    'uniform': Uniform,
    'random': Random,
    'wanda': Wanda,
    'taylor': Taylor,
    'agp': AGP,
    'acdc': ACDC,
    'pdp': PDP,
    'movement': Movement,
    'sequential_attention': SequentialAttention,
}

__all__ = ['METHODS', 'Method', *(method.__name__ for method in METHODS.values())]
