"""The executor on ResNet-50's 3x3 convolutions, pruned in blocks: dense against sparse, in turn.

    python benchmarks/executor.py --threads 2
    python benchmarks/executor.py --block 16 8 --sparsity 0.9 --spread even

For every shape, and for the stack of all sixteen layers, at batch 1 and 8: torch's convolution in
its two memory formats, oneDNN's with a weight that is reordered once beforehand, and ours. The
speed-up is over the faster of torch's two formats, from medians and from the fastest round of each:
on a machine that others use, the fastest rounds tell what the code takes. `accelerate` at the end
says what it chooses in the whole network, if torchvision is installed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmsmart.executor import accelerate
from mmsmart.executor.forward import SparseForward

# Input channels, output channels, stride, image size, and how many such layers ResNet-50 has.
LAYERS = [
    (64, 64, 1, 56, 3),
    (128, 128, 2, 56, 1),
    (128, 128, 1, 28, 3),
    (256, 256, 2, 28, 1),
    (256, 256, 1, 14, 5),
    (512, 512, 2, 14, 1),
    (512, 512, 1, 7, 2),
]
NAMES = ('contiguous', 'channels last', 'reordered', 'sparse')


def prune(weight: Tensor, block: Sequence[int], sparsity: float, uneven: bool) -> None:
    """Zero random blocks: any of them alike, or more of them in some rows, columns and corners."""
    out, channels, *kernel = weight.shape
    grid = [-(-out // block[0]), -(-channels // block[1]), *kernel]
    scores = torch.randn(grid)
    if uneven:
        scores += torch.randn(grid[0], 1, 1, 1) + torch.randn(1, grid[1], 1, 1)
        scores += torch.randn(1, 1, *kernel) * (len(kernel) > 0)
    kept = scores > scores.flatten().kthvalue(max(1, round(sparsity * scores.numel()))).values
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight.data *= mask[:out, :channels]


def fastest_and_median(
    runs: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each, every round beginning with another."""
    names, seconds = list(runs), {name: [] for name in runs}
    for i in range(-2, rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            runs[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: (1e3 * min(s), 1e3 * statistics.median(s)) for name, s in seconds.items()}


def candidates(layer: nn.Conv2d, images: Tensor) -> dict[str, Callable[[], object]]:
    """What is compared, on images in the format that each likes."""
    last = images.contiguous(memory_format=torch.channels_last)
    in_last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    geometry = layer.padding, layer.stride, layer.dilation
    reordered = torch.ops.mkldnn._reorder_convolution_weight(
        layer.weight.detach(), *geometry, 1, list(images.shape)
    )
    sparse = SparseForward(in_last)
    return {
        'contiguous': lambda: layer(images),
        'channels last': lambda: in_last(last),
        'reordered': lambda: torch.ops.mkldnn._convolution_pointwise(
            last, reordered, None, *geometry, 1, 'none', [], ''
        ),
        'sparse': lambda: sparse(last),
    }


def row(label: str, times: Mapping[str, tuple[float, float]]) -> str:
    dense = [min(times[name][i] for name in NAMES[:2]) for i in range(2)]
    columns = [f'{low:.3f} / {median:.3f}' for low, median in (times[name] for name in NAMES)]
    gains = [f'{dense[i] / times["sparse"][i]:.2f}' for i in range(2)]
    last = [f'{times["reordered"][0] / times["sparse"][0]:.2f}']
    return f'| {" | ".join([label, *columns, *gains, *last])} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--block', type=int, nargs=2, default=(16, 16), metavar=('OUT', 'IN'))
    parser.add_argument('--sparsity', type=float, default=0.8)
    parser.add_argument('--spread', choices=('even', 'uneven'), default='uneven')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=(1, 8))
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--rounds', type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(f'{args.threads} threads, blocks {args.block}, {args.sparsity:.0%}, {args.spread} spread')
    print('Milliseconds: fastest / median round.\n')
    print('| layer | ' + ' | '.join(NAMES) + ' | speed-up, fastest | median | over reordered |')
    print('|---|' + '---:|' * 7)
    with torch.inference_mode():
        for batch in args.batch_sizes:
            stack: dict[str, list[Callable[[], object]]] = {name: [] for name in NAMES}
            for channels, out, stride, size, count in LAYERS:
                for i in range(count):
                    layer = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
                    prune(layer.weight, args.block, args.sparsity, args.spread == 'uneven')
                    runs = candidates(layer, torch.rand(batch, channels, size, size))
                    for name in NAMES:
                        stack[name].append(runs[name])
                    if i == 0:
                        times = fastest_and_median(runs, args.rounds)
                        label = f'{channels} to {out}, {size}² / {stride}, batch {batch}'
                        print(row(label, times), flush=True)
            whole = {name: (lambda s=own: [run() for run in s]) for name, own in stack.items()}
            times = fastest_and_median(whole, args.rounds)
            print(row(f'**all 16 layers, batch {batch}**', times), flush=True)
        for batch in args.batch_sizes:
            network(args, batch)


def network(args: argparse.Namespace, batch: int) -> None:
    """All of ResNet-50 with random weights, the stem and the classifier dense."""
    try:
        from torchvision.models import resnet50
    except ImportError:
        return
    model = resnet50().eval()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and name != 'conv1':
            prune(layer.weight, args.block, args.sparsity, args.spread == 'uneven')
    images = torch.rand(batch, 3, 224, 224)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    fast = copy.deepcopy(last)
    choices = accelerate(fast, images_last)
    runs = {
        'contiguous': lambda: model(images),
        'channels last': lambda: last(images_last),
        'sparse': lambda: fast(images_last),
    }
    times = fastest_and_median(runs, args.rounds)
    dense = [min(times[name][i] for name in NAMES[:2]) for i in range(2)]
    sparse = sum(choice.backend == 'sparse' for choice in choices)
    difference = (model(images) - fast(images_last)).abs().max() / model(images).abs().max()
    print(
        f'\nResNet-50, batch {batch}: {dense[0]:.1f} ms dense, {times["sparse"][0]:.1f} sparse '
        f'(fastest rounds, {dense[0] / times["sparse"][0]:.2f}x; medians '
        f'{dense[1] / times["sparse"][1]:.2f}x), {sparse} of {len(choices)} layers sparse, outputs '
        f'differ by {difference:.1e} of the largest.'
    )


if __name__ == '__main__':
    main()
