"""Time a training step in the search and in the fine-tuning against the dense step.

    python benchmarks/training_step.py --model resnet50 --batch 16 --size 224 --threads 1
    python benchmarks/training_step.py --model mmdet:yolox/yolox_s_8xb8-300e_coco.py --size 416

The kinds of step are taken in turn in one process, so that a change of the machine's speed
meets all of them; the table gives medians, and medians of the rounds' ratios. A step is forward,
backward and optimiser (SGD with momentum and weight decay) of a torchvision classifier on noise, or
of a stock model of mmpretrain, mmdet or mmseg on synthetic data and its own losses.

What a detector does depends on what it predicts, and soft masks change that. The profile below the
table is free of it: it times what pruning adds to the step, part by part.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mmsmart
from mmsmart.blocks import find_layers
from mmsmart.importance import magnitude
from mmsmart.methods import Smart

# The second dense model is a control: what tells it from the first is the machine.
STAGES = ('dense', 'search', 'finetune', 'dense again')
PARTS = ('forward and backward', 'before', 'optimizer', 'importance', 'after')


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that say what is trained, and how."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--model', default='resnet18', help='torchvision classifier, or PACKAGE:CONFIG'
    )
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels')
    parser.add_argument('--batch', type=int, default=16, help='images a step')
    parser.add_argument('--block', type=int, nargs=4, default=(16, 8, 1, 1))
    parser.add_argument('--sparsity', type=float, default=0.8)
    parser.add_argument('--temperature', type=float, default=0.5)
    parser.add_argument('--rounds', type=int, default=7, help='steps of each kind')
    parser.add_argument('--threads', type=int, help='CPU threads')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


def task(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The model, and its loss."""
    if ':' in args.model:
        return stock_task(*args.model.split(':'), args)
    import torchvision

    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    model = torchvision.models.get_model(args.model)
    return model, lambda network: nn.functional.cross_entropy(network(images), labels)


def stock_task(
    package: str, config: str, args: argparse.Namespace
) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from mmengine.registry import MODELS, DefaultScope

    from mmsmart.engine.sweep.stock_models import StockModel, stock_model_config
    from mmsmart.engine.sweep.synthetic import synthetic_batch

    DefaultScope.get_instance('benchmark', scope_name=package)
    stock = StockModel(package, config).load()
    model = MODELS.build(stock_model_config(stock))
    logging.disable(logging.WARNING)  # of first weights, one line a parameter
    model.init_weights()
    two = synthetic_batch(package, stock, args.size)
    data = {key: (list(value) * args.batch)[: args.batch] for key, value in two.items()}

    def loss(network: nn.Module) -> Tensor:
        torch.manual_seed(0)  # samplers of detectors draw
        ready = network.data_preprocessor(copy.deepcopy(data), True)
        return network.parse_losses(network(**ready, mode='loss'))[0]

    return model, loss


def stepper(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], stage: str, args: argparse.Namespace
) -> Callable[[], list[float]]:
    """A function that takes one whole training step of a stage, and gives the seconds of PARTS."""
    model.to(args.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9, weight_decay=1e-4)
    masks = None
    if not stage.startswith('dense'):
        masks = mmsmart.install_masks(
            model, sparsity=args.sparsity, block=tuple(args.block), method=Smart(curvature=1.0)
        )
        masks.begin(magnitude(masks.layers), temperature=args.temperature)
        importance_optimizer = torch.optim.Adam([masks.importance], lr=0.002)
    if stage == 'finetune':
        masks.harden()

    def latent_weights() -> AbstractContextManager:
        return nullcontext() if masks is None else masks.latent_weights()

    def now() -> float:
        if args.device != 'cpu':
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> list[float]:
        times = [now()]
        loss(model).backward()
        times.append(now())
        with latent_weights():
            times.append(now())
            optimizer.step()
            times.append(now())
            if stage == 'search':
                importance_optimizer.step()
            times.append(now())
        times.append(now())
        optimizer.zero_grad()
        if stage == 'search':
            importance_optimizer.zero_grad()
        return [end - begin for begin, end in pairwise(times)]

    return step


def time_steps(args: argparse.Namespace, console: Console) -> None:
    torch.manual_seed(0)
    model, loss = task(args)
    steps = {stage: stepper(copy.deepcopy(model), loss, stage, args) for stage in STAGES}
    parts: dict[str, list[list[float]]] = {stage: [] for stage in STAGES}
    for round_ in range(args.rounds + 1):
        first = round_ % len(STAGES)
        for stage in STAGES[first:] + STAGES[:first]:
            seconds = steps[stage]()
            if round_:  # the first warms up
                parts[stage].append(seconds)

    times = {stage: [sum(seconds) for seconds in parts[stage]] for stage in STAGES}
    layers, _ = find_layers(model, args.block)
    blocks = sum(layer.num_blocks for layer in layers)
    weights = sum(layer.weight.numel() for layer in layers)
    table = Table(
        title=f'{args.model}, {args.batch} x {args.size}² on {args.device}, '
        f'{blocks:,} blocks of {"x".join(map(str, args.block))} with {weights:,} weights '
        f'in {len(layers)} layers, {args.rounds} rounds'
    )
    titles = ('step', 'median ms', 'min ms', '/ dense')
    for title in (*titles, *PARTS, 'added by pruning, ms', '(dense + added) / dense'):
        table.add_column(title, justify='left' if title == 'step' else 'right')
    dense = statistics.median(times['dense'])
    for stage in STAGES:
        ratio = statistics.median(a / b for a, b in zip(times[stage], times['dense']))
        medians = [statistics.median(column) for column in zip(*parts[stage])]
        extra = medians[1] + medians[3] + medians[4]
        values = [statistics.median(times[stage]), min(times[stage])]
        table.add_row(
            stage,
            *(f'{1e3 * value:.1f}' for value in values),
            f'{ratio:.3f}',
            *(f'{1e3 * value:.1f}' for value in medians),
            f'{1e3 * extra:.1f}',
            f'{1 + extra / dense:.3f}',
        )
    console.print(table)


def main() -> None:
    args = parser_of(__doc__).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    time_steps(args, Console(width=200))


if __name__ == '__main__':
    main()
