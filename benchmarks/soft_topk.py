"""Time soft_topk against torch.topk, torch.kthvalue and bisection; count its solver's passes.

Run by hand:

    python benchmarks/soft_topk.py
    python benchmarks/soft_topk.py --sizes 1000000 --temperatures 0.01 --threads 1

All candidates take turns within each round, so that a noisy machine disturbs them alike; the table
gives medians over the rounds, and in brackets the median of each round's ratio to torch.topk; then
the fastest round of each, which tells what the code takes where other work interrupts most rounds.
With --threads 1 on a CPU it is the thread's own time that counts, without that of other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from mmsmart.functional import soft_topk, soft_topk_vjp, solve_threshold, threshold

KEPT_SHARE = 0.2


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    print(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads')
    for size in args.sizes:
        for temperature in args.temperatures:
            report(size, temperature, args.rounds, device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--sizes', type=int, nargs='+', default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument('--temperatures', type=float, nargs='+', default=[3.0, 0.1, 0.01])
    parser.add_argument('--rounds', type=int, default=21)
    parser.add_argument('--threads', type=int, default=0, help='0 leaves what torch chose')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def report(size: int, temperature: float, rounds: int, device: torch.device) -> None:
    m = torch.randn(size, device=device)
    cost = (torch.rand(size, device=device) + 0.5).double()
    grad = torch.randn(size, device=device)
    kept = max(1, int(KEPT_SHARE * size))
    dear = KEPT_SHARE * cost.sum().item()
    leaf = m.clone().requires_grad_()
    # What one training step does to the importance: a warm start is the θ of the step before.
    before = m - 0.01 * temperature * grad
    theta = solve_threshold(before, kept, temperature)

    def forward_backward(budget: float, price: torch.Tensor | None) -> None:
        leaf.grad = None
        soft_topk(leaf, budget, temperature, price).backward(grad)

    candidates: dict[str, Callable[[], object]] = {
        'torch.topk': lambda: torch.topk(m, kept),
        'torch.kthvalue': lambda: torch.kthvalue(m, size - kept + 1),
        'plain bisection, forward': lambda: bisect(m, kept, temperature),
        'solve_threshold, cold': lambda: solve_threshold(m, kept, temperature),
        'solve_threshold, warm': lambda: solve_threshold(m, kept, temperature, start=theta),
        'soft_topk_vjp': lambda: soft_topk_vjp(m, theta, temperature, grad),
        'soft_topk, forward': lambda: soft_topk(m, kept, temperature),
        'soft_topk, forward + backward': lambda: forward_backward(kept, None),
        'the same with costs': lambda: forward_backward(dear, cost),
    }
    alone = device.type == 'cpu' and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 2):
        for name, call in candidates.items():
            begin = clock()
            call()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            # The first rounds warm up caches and allocators.
            if round_ >= 2:
                seconds[name].append(clock() - begin)

    print(f'\nN = {size:,}, temperature {temperature:g}')
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds['torch.topk']))
        fastest = min(times) / min(seconds['torch.topk'])
        print(
            f'  {name:32s} {statistics.median(times) * 1e3:9.3f} ms  ({ratio:.2f})'
            f'  fastest {min(times) * 1e3:9.3f} ms  ({fastest:.2f})'
        )
    if device.type == 'cpu':
        cold = count_passes(m, kept, temperature, None)
        warm = count_passes(m, kept, temperature, theta)
        print(f'  passes of the solver: {cold} cold, {warm} warm')


def bisect(m: torch.Tensor, budget: float, temperature: float) -> torch.Tensor:
    """The soft mask as one would write it down first: θ by bisection in float64."""
    x = m.double()
    low, high = x.min() - 40 * temperature, x.max() + 40 * temperature
    for _ in range(50):
        middle = 0.5 * (low + high)
        above = torch.sigmoid((x - middle) / temperature).sum() > budget
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.sigmoid((x - low) / temperature).to(m.dtype)


def count_passes(
    m: torch.Tensor, budget: float, temperature: float, start: torch.Tensor | None
) -> int:
    kept, passes = threshold._Scaled.kept, []

    def counted(x: threshold._Scaled, t: float) -> tuple[float, float, float]:
        passes.append(x.total == len(m))  # those over a sample of m are cheap
        return kept(x, t)

    with mock.patch.object(threshold._Scaled, 'kept', counted):
        solve_threshold(m, budget, temperature, start=start)
    return sum(passes)


if __name__ == '__main__':
    main()
