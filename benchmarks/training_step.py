"""Time a training step in the search and in the fine-tuning against the dense step.

    python benchmarks/training_step.py --model resnet50 --size 224 --batch 4 --block 16 8 1 1

The three kinds of step are taken in turn in one process, so that a change of the machine's speed
meets all of them; the table gives medians and ratios. Forward, backward and optimiser step of a
torchvision model on random images, SGD with momentum and weight decay.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from rich.console import Console
from rich.table import Table

import mmsmart
from mmsmart.importance import magnitude


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='resnet18', help='name of a torchvision classifier')
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels')
    parser.add_argument('--batch', type=int, default=8, help='images a step')
    parser.add_argument('--block', type=int, nargs=4, default=(16, 8, 1, 1))
    parser.add_argument('--sparsity', type=float, default=0.8)
    parser.add_argument('--rounds', type=int, default=10, help='steps of each kind')
    parser.add_argument('--threads', type=int, help='CPU threads')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args()


def stepper(model: torch.nn.Module, images: torch.Tensor, stage: str, args) -> Callable[[], None]:
    """A function that takes one whole training step of a stage."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    masks, importance_optimizer = None, None
    if stage != 'dense':
        masks = mmsmart.install_masks(model, sparsity=args.sparsity, block=tuple(args.block))
        masks.begin(magnitude(masks.layers), temperature=0.5)
        importance_optimizer = torch.optim.Adam([masks.importance], lr=0.02)
    if stage == 'finetune':
        masks.harden()

    def step() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        if masks is None:
            optimizer.step()
        else:
            with masks.latent_weights():
                optimizer.step()
                if masks.state == 'soft':
                    importance_optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model).to(args.device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    stages = ('dense', 'search', 'finetune')
    steps = {stage: stepper(copy.deepcopy(model), images, stage, args) for stage in stages}
    times: dict[str, list[float]] = {stage: [] for stage in stages}
    for round_ in range(args.rounds + 2):
        for stage, step in steps.items():
            started = time.perf_counter()
            step()
            if round_ >= 2:  # the first two warm up
                times[stage].append(time.perf_counter() - started)

    blocks = mmsmart.install_masks(model, block=tuple(args.block)).num_blocks
    table = Table(
        title=f'{args.model}, {args.batch} x {args.size}² on {args.device}, {blocks:,} blocks of '
        f'{"x".join(map(str, args.block))}, {args.rounds} rounds'
    )
    for title in ('step', 'median ms', 'min ms', 'max ms', '/ dense (median of pairs)'):
        table.add_column(title, justify='left' if title == 'step' else 'right')
    for stage in stages:
        ratio = statistics.median(a / b for a, b in zip(times[stage], times['dense']))
        values = [1e3 * f(times[stage]) for f in (statistics.median, min, max)]
        table.add_row(stage, *(f'{value:.1f}' for value in values), f'{ratio:.3f}')
    Console().print(table)


if __name__ == '__main__':
    main()
