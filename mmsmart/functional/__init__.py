"""Pure tensor maths: masks under a budget, sums over blocks, temperature schedules.

Needs torch only. Source: SMART pruner, arXiv 2403.19969.
"""

from .blocks import block_expand, block_grid, block_reduce, block_sizes
from .coupled import CoupledCost, coupled_topk, solve_coupled_threshold
from .temperature import TemperatureSchedule, temperature_at
from .threshold import solve_threshold
from .topk import hard_topk, soft_mask, soft_topk, soft_topk_vjp

__all__ = [
    'CoupledCost',
    'TemperatureSchedule',
    'block_expand',
    'block_grid',
    'block_reduce',
    'block_sizes',
    'coupled_topk',
    'hard_topk',
    'soft_mask',
    'soft_topk',
    'soft_topk_vjp',
    'solve_coupled_threshold',
    'solve_threshold',
    'temperature_at',
]
