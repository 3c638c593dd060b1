"""The executor on ResNet-50's 3x3 convolutions, pruned in blocks: dense against sparse, in turn.

    python benchmarks/executor.py --threads 2
    python benchmarks/executor.py --block 16 8 --sparsity 0.9 --spread even
    python benchmarks/executor.py --device cuda --dtype bfloat16 --batch-sizes 8 64

For every shape, and for the stack of all sixteen layers, at batch 1 and 8: torch's convolution in
its two memory formats, on a CPU oneDNN's with a weight that is reordered once beforehand, and ours.
The speed-up is over the faster of torch's two formats, from medians and from the fastest round of
each: on a machine that others use, the fastest rounds tell what the code takes. A round on a GPU
ends when the GPU is done; in float32 torch may use TF32 there, and ours does not. `accelerate` at
the end says what it chooses in the whole network, if torchvision is installed.
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
from mmsmart.executor.forward import SparseForward, sparse_forwards

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
DENSE = ('contiguous', 'channels last')


def prune(weight: Tensor, block: Sequence[int], sparsity: float, uneven: bool) -> None:
    """Zero random blocks: any of them alike, or more of them in some rows, columns and corners."""
    out, channels, *kernel = weight.shape
    grid = [-(-out // block[0]), -(-channels // block[1]), *kernel]
    scores = torch.randn(grid, dtype=torch.float32)
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
            wait()
            begin = time.perf_counter()
            runs[name]()
            wait()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: (1e3 * min(s), 1e3 * statistics.median(s)) for name, s in seconds.items()}


def wait() -> None:
    """Until the GPU is done, if it was given something to do."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def candidates(layer: nn.Conv2d, images: Tensor) -> dict[str, Callable[[], object]]:
    """What is compared, on images in the format that each likes."""
    last = images.contiguous(memory_format=torch.channels_last)
    in_last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    sparse = fastest_sparse(in_last, last)
    runs = {'contiguous': lambda: layer(images), 'channels last': lambda: in_last(last)}
    if images.device.type == 'cpu':
        geometry = layer.padding, layer.stride, layer.dilation
        reordered = torch.ops.mkldnn._reorder_convolution_weight(
            layer.weight.detach(), *geometry, 1, list(images.shape)
        )
        runs['reordered'] = lambda: torch.ops.mkldnn._convolution_pointwise(
            last, reordered, None, *geometry, 1, 'none', [], ''
        )
    return {**runs, 'sparse': lambda: sparse(last)}


def fastest_sparse(layer: nn.Conv2d, images: Tensor) -> SparseForward:
    """The one way there is on a CPU, and on a GPU the fastest of some."""
    ways = sparse_forwards(layer)
    if len(ways) == 1:
        return ways[0]
    runs = {str(i): (lambda way=way: way(images)) for i, way in enumerate(ways)}
    times = fastest_and_median(runs, 10)
    return ways[int(min(times, key=lambda i: times[i][0]))]


def row(label: str, times: Mapping[str, tuple[float, float]]) -> str:
    dense = [min(times[name][i] for name in DENSE) for i in range(2)]
    columns = [f'{low:.3f} / {median:.3f}' for low, median in times.values()]
    gains = [f'{dense[i] / times["sparse"][i]:.2f}' for i in range(2)]
    if 'reordered' in times:
        gains.append(f'{times["reordered"][0] / times["sparse"][0]:.2f}')
    return f'| {" | ".join([label, *columns, *gains])} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--block', type=int, nargs=2, default=(16, 16), metavar=('OUT', 'IN'))
    parser.add_argument('--sparsity', type=float, default=0.8)
    parser.add_argument('--spread', choices=('even', 'uneven'), default='uneven')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=(1, 8))
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument(
        '--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32', help='on a GPU'
    )
    args = parser.parse_args()
    on_cpu = args.device == 'cpu'
    if on_cpu and args.dtype != 'float32':
        parser.error('--dtype: on a CPU the executor computes in float32 only.')
    if not on_cpu and not torch.cuda.is_available():
        parser.error('--device: torch sees no CUDA device.')
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    torch.set_default_dtype(getattr(torch, args.dtype))
    where = f'{args.threads} threads' if on_cpu else torch.cuda.get_device_name()
    print(
        f'{where}, {args.dtype}, blocks {args.block}, {args.sparsity:.0%}, {args.spread} spread\n'
        'Milliseconds: fastest / median round.\n'
    )
    names = [*DENSE, *['reordered'] * on_cpu, 'sparse']
    gains = ['speed-up, fastest', 'median', *['over reordered'] * on_cpu]
    print(f'| layer | {" | ".join([*names, *gains])} |')
    print('|---|' + '---:|' * len([*names, *gains]))
    with torch.inference_mode():
        for batch in args.batch_sizes:
            stack: dict[str, list[Callable[[], object]]] = {name: [] for name in names}
            for channels, out, stride, size, count in LAYERS:
                for i in range(count):
                    layer = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
                    prune(layer.weight, args.block, args.sparsity, args.spread == 'uneven')
                    runs = candidates(layer, torch.rand(batch, channels, size, size))
                    for name in names:
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
    dense = [min(times[name][i] for name in DENSE) for i in range(2)]
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
