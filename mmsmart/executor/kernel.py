"""The kernel for CPUs, kernel.cpp: how a weight is packed for it, and how it is compiled."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name('kernel.cpp')
_LANES = 16  # output channels of a vector, as in kernel.cpp
_UNITS = (8, 1)  # input channels of a unit: those that kernel.cpp has a loop for
# A loop over single input channels takes up to 1.4 times as long for the same number of weights.
_FINER_PAYS_BELOW = 0.75

_FLAGS = {
    'AVX512': ['-mavx512f', '-mavx512vl', '-mavx512bw', '-mavx512dq', '-mfma'],
    'AVX2': ['-mavx2', '-mfma'],
}


class KernelUnavailable(RuntimeError):
    """No kernel runs on this machine; the message says what is missing."""


@dataclass(frozen=True)
class PackedWeight:
    """What is left of a weight `(out, in, kh, kw)`, in the order in which the kernel reads it.

    Args:
        units: `(K, input channels, 16)`, the units with a weight that is not zero.
        positions: int64 `(K, 3)`: first input channel, and place in the kernel.
        ends: int64, where every 16 output channels begin and end among the units.
        bias: One value an output channel, filled with zeros to a multiple of 16.
        shape: Shape of the weight.
        density: Share of the weight that the kernel visits, zeros inside a unit included.
    """

    units: Tensor
    positions: Tensor
    ends: Tensor
    bias: Tensor
    shape: tuple[int, ...]
    density: float

    def convolve(self, input: Tensor, *geometry: list[int], channels_last: bool) -> Tensor:
        """Convolve a batch `(N, in, H, W)`; geometry: kernel, stride, padding and dilation."""
        return compiled()(
            input, self.units, self.positions, self.ends, self.bias, self.shape[0], *geometry,
            channels_last,
        )  # fmt: skip


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Keep the units of a weight that are not all zero: 16 output channels by 8 input channels.

    Where single input channels leave much less, as in blocks of 16x1, units are of one.

    Args:
        weight: `(out, in, kh, kw)`, float32.
        bias: `(out,)` or None.

    Example:
        >>> weight = torch.zeros(32, 16, 3, 3)
        >>> weight[:16, 8:, 1, 1] = 1
        >>> packed = pack(weight)
        >>> tuple(packed.units.shape), packed.positions.tolist(), packed.ends.tolist()
        ((1, 8, 16), [[8, 1, 1]], [0, 1, 1])
    """
    coarse, fine = (_packed(weight, bias, unit) for unit in _UNITS)
    return fine if fine.density < _FINER_PAYS_BELOW * coarse.density else coarse


def packings(weight: Tensor, bias: Tensor | None = None) -> list[PackedWeight]:
    """The ways to compute with a weight among which measuring decides: for CPUs the one."""
    return [pack(weight, bias)]


def kept_units(weight: Tensor, lanes: int, unit: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """What is left of a weight, as units of `unit` input channels by `lanes` output channels.

    Args:
        weight: `(out, in, kh, kw)`, filled up with zeros to whole units.
        lanes: Output channels of a row of blocks.
        unit: Input channels of a unit.

    Returns:
        The units `(K, unit, lanes)` with a weight that is not zero, row by row; their places
        `(K, 3)`: which of the input channels' units, row and column in the kernel; how many each
        row of blocks has; and the share of all units that they are.
    """
    out, channels, *kernel = weight.shape
    rows, columns = -(-out // lanes), -(-channels // unit)
    whole = weight.new_zeros(rows * lanes, columns * unit, *kernel)
    whole[:out, :channels] = weight.detach()
    units = whole.view(rows, lanes, columns, unit, *kernel).permute(0, 2, 4, 5, 3, 1)
    left = (units != 0).flatten(4).any(-1)
    density = int(left.sum()) / left.numel()
    return units[left].contiguous(), left.nonzero()[:, 1:], left.flatten(1).sum(1), density


def _packed(weight: Tensor, bias: Tensor | None, unit: int) -> PackedWeight:
    units, places, counts, density = kept_units(weight, _LANES, unit)
    positions = (places * torch.tensor([unit, 1, 1])).contiguous()
    ends = torch.zeros(len(counts) + 1, dtype=torch.int64)
    ends[1:] = counts.cumsum(0)
    filled = weight.new_zeros(len(counts) * _LANES)
    if bias is not None:
        filled[: len(bias)] = bias.detach()
    return PackedWeight(units, positions, ends, filled, tuple(weight.shape), density)


@cache
def compiled() -> Callable[..., Tensor]:
    """The kernel as a torch operator, compiled at the first call of all.

    The result is kept in torch's cache of extensions, `TORCH_EXTENSIONS_DIR`; later processes load
    it from there within a second.

    Raises:
        KernelUnavailable: Without a compiler or ninja, or if compiling fails.
    """
    compiler = os.environ.get('CXX', 'c++')
    if os.name != 'posix':
        raise KernelUnavailable('the kernel is not written for Windows.')
    if not shutil.which(compiler):
        raise KernelUnavailable(
            f'no C++ compiler: {compiler!r} is not on the PATH. Install g++ (or clang), or name '
            'yours in the environment variable CXX.'
        )
    if not shutil.which('ninja') and shutil.which('ninja', path=sysconfig.get_path('scripts')):
        # Installed by pip into an environment that was not activated.
        os.environ['PATH'] = os.pathsep.join([os.environ['PATH'], sysconfig.get_path('scripts')])
    if not shutil.which('ninja'):
        raise KernelUnavailable('no ninja, which torch compiles with: pip install ninja.')
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ['-O3', '-fopenmp', *_FLAGS.get(capability, [])]
    try:
        # Takes a second to import, which nobody else should wait for.
        from torch.utils.cpp_extension import load

        load(
            # A cache in a home that several machines share must not mix their instructions.
            f'mmsmart_executor_{capability.lower().replace(" ", "_")}',
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=['-fopenmp'],
            is_python_module=False,
        )
    except (ImportError, OSError, RuntimeError) as error:
        raise KernelUnavailable(f'compiling {SOURCE.name} failed: {error}') from error
    return torch.ops.mmsmart_executor.block_sparse_conv2d
