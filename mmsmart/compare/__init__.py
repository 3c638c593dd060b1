"""Comparing pruning methods: a suite of runs, their processes, and what comes of them."""

from .drawing import draw_curves
from .folder import JobFolder
from .grid import Job, config_text, jobs_of, selected
from .page import markdown, picture_name
from .processes import command_of, environments, run_jobs, visible_gpus
from .results import (
    Duel,
    Mean,
    Result,
    collect,
    dense_mean,
    duels,
    expect_result,
    mean_of,
    save_csv,
)
from .suite import Method, Suite, Task, block_name, found, read_suite, suite_of

__all__ = [
    'Duel',
    'Job',
    'JobFolder',
    'Mean',
    'Method',
    'Result',
    'Suite',
    'Task',
    'block_name',
    'collect',
    'command_of',
    'config_text',
    'dense_mean',
    'draw_curves',
    'duels',
    'environments',
    'expect_result',
    'found',
    'jobs_of',
    'markdown',
    'mean_of',
    'picture_name',
    'read_suite',
    'run_jobs',
    'save_csv',
    'selected',
    'suite_of',
    'visible_gpus',
]
