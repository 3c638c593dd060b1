"""How the cost of a training step grows with the number of blocks, from blocks of 32x32 to 1x1.

    python benchmarks/growth.py --model resnet18 --batch 16 --size 224 --threads 1

Steps of the search, taken in turn in one process as in training_step.py, whose options these are.
The ratio is to the step of the first of `--sides`, once as a median over the rounds and once from
what pruning adds alone, which a change of the machine's speed disturbs less.
"""

from __future__ import annotations

import copy
import statistics

import torch
from rich.console import Console
from rich.table import Table
from training_step import parser_of, stepper, task

from mmsmart.blocks import find_layers


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('--sides', type=int, nargs='+', default=[32, 16, 8, 4, 2, 1])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, loss = task(args)
    steps, numbers = {}, {}
    for side in args.sides:
        args.block = (side, side, 1, 1)
        steps[side] = stepper(copy.deepcopy(model), loss, 'search', args)
        layers, _ = find_layers(model, args.block)
        numbers[side] = sum(layer.num_blocks for layer in layers)
    seconds: dict[int, list[list[float]]] = {side: [] for side in steps}
    for round_ in range(args.rounds + 1):
        first = round_ % len(args.sides)
        for side in args.sides[first:] + args.sides[:first]:
            parts = steps[side]()
            if round_:  # the first warms up
                seconds[side].append(parts)

    times = {side: [sum(parts) for parts in rows] for side, rows in seconds.items()}
    added = {
        side: statistics.median(parts[1] + parts[3] + parts[4] for parts in rows)
        for side, rows in seconds.items()
    }
    whole = times[args.sides[0]]
    table = Table(
        title=f'{args.model}, {args.batch} x {args.size}² on {args.device}, {args.rounds} rounds'
    )
    for title in ('block', 'blocks', 'median ms', 'ratio', 'added ms', 'ratio by what is added'):
        table.add_column(title, justify='right')
    for side in args.sides:
        ratio = statistics.median(a / b for a, b in zip(times[side], whole))
        by_added = 1 + (added[side] - added[args.sides[0]]) / statistics.median(whole)
        table.add_row(
            f'{side}x{side}',
            f'{numbers[side]:,}',
            f'{1e3 * statistics.median(times[side]):.0f}',
            f'{ratio:.3f}',
            f'{1e3 * added[side]:.1f}',
            f'{by_added:.3f}',
        )
    Console(width=120).print(table)


if __name__ == '__main__':
    main()
