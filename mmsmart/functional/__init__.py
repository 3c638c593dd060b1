"""Pure tensor maths: masks under a budget, sums over blocks, temperature schedules.

Needs torch only. Source: SMART pruner, arXiv 2403.19969.
"""

from .blocks import (
    block_dot,
    block_expand,
    block_grid,
    block_reduce,
    block_scale,
    block_sizes,
)
from .costs import BlockCost, Cost, CurveCost, Curves, LinearCost
from .coupled import CoupledCost, coupled_topk
from .curvature import blend_log_squares
from .floors import Floors
from .limits import (
    Limit,
    limited_topk,
    limits_mask,
    limits_vjp,
    solve_limits,
    tightest,
)
from .n_of_m import rows_mask, rows_topk, rows_vjp, solve_row_thresholds
from .runs import Runs
from .temperature import TemperatureSchedule, temperature_at
from .threshold import solve_threshold
from .topk import hard_topk, soft_mask, soft_topk, soft_topk_vjp

__all__ = [
    'BlockCost',
    'Cost',
    'CoupledCost',
    'CurveCost',
    'Curves',
    'Floors',
    'Limit',
    'LinearCost',
    'Runs',
    'TemperatureSchedule',
    'blend_log_squares',
    'block_dot',
    'block_expand',
    'block_grid',
    'block_reduce',
    'block_scale',
    'block_sizes',
    'coupled_topk',
    'hard_topk',
    'limited_topk',
    'limits_mask',
    'limits_vjp',
    'rows_mask',
    'rows_topk',
    'rows_vjp',
    'soft_mask',
    'soft_topk',
    'soft_topk_vjp',
    'solve_limits',
    'solve_row_thresholds',
    'solve_threshold',
    'temperature_at',
    'tightest',
]
