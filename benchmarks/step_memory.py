"""Peak memory of training steps in the search and in the fine-tuning against dense ones.

    python benchmarks/step_memory.py --model resnet50 --batch 4 --size 224
    python benchmarks/step_memory.py --model resnet18 --batch 4 --size 64 --block 1 1 1 1

The options are those of training_step.py. On a CPU every tensor that torch's profiler sees made and
freed is counted, on a GPU what `torch.cuda` says: most bytes alive at a time in the second and
third step, and those alive after it, between steps. The last columns are what the search takes
beside the masked weights, by block.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from training_step import parser_of, stepper, task

from mmsmart.blocks import find_layers

TITLES = ('step', 'peak MB', 'between steps', 'masked weights')
BY_BLOCK = ('bytes a block at the peak', 'between steps')


def memory(stage: str, args: argparse.Namespace) -> tuple[int, int]:
    """Most bytes alive at a time, and those alive between steps."""
    torch.manual_seed(0)
    on_gpu = args.device != 'cpu'
    recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with nullcontext() if on_gpu else recording as profiler:
        step = stepper(*task(args), stage, args)
        step()
        begin = time.time_ns()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
    if on_gpu:
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, alive)
    return peak, alive


def main() -> None:
    args = parser_of(__doc__).parse_args()
    layers, _ = find_layers(task(args)[0], args.block)
    masked = sum(layer.weight.nbytes for layer in layers)
    blocks = sum(layer.num_blocks for layer in layers)
    table = Table(
        title=f'{args.model}, {args.batch} x {args.size}² on {args.device}, {blocks:,} blocks of '
        f'{"x".join(map(str, args.block))}'
    )
    for title in (*TITLES, *BY_BLOCK):
        table.add_column(title, justify='left' if title == 'step' else 'right')
    taken = {stage: memory(stage, args) for stage in ('dense', 'search', 'finetune')}
    for stage, both in taken.items():
        beside = [(x - dense - masked) / blocks for x, dense in zip(both, taken['dense'])]
        by_block = [f'{x:.1f}' for x in beside] if stage == 'search' else []
        table.add_row(stage, *(f'{x / 1e6:.2f}' for x in (*both, masked)), *by_block)
    Console(width=120).print(table)


if __name__ == '__main__':
    main()
