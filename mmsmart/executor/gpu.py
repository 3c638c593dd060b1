"""The kernel for GPUs, in Triton: the twin of kernel.cpp, for float32, float16 and bfloat16.

An implicit matrix product. One program computes a tile of the output, `pixels` positions by `lanes`
output channels: it walks over what is left of its row of blocks, `depth` weights of each output
channel at a time, gathers their inputs (zeros beyond the border) and multiplies both with `tl.dot`,
in float32 sums. What is zero is neither stored nor visited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .kernel import KernelUnavailable, kept_units

# Output channels of a row of blocks, input channels that are kept or skipped together, weights of
# an output channel at a time, and output positions of a program. `tl.dot` takes 16 or more of each;
# 8 halves are the largest load there is.
_LANES, _UNITS, _DEPTHS, _PIXELS = (64, 32, 16), (64, 32, 16, 8), (64, 32, 16), (128, 64, 32)
# Products in full float32 are unrolled, number by number: large tiles take long to compile.
_UNITS_FLOAT32, _DEPTHS_FLOAT32, _PIXELS_FLOAT32 = (16, 8), (16,), (64, 32)
# How much more may be visited for a coarser unit, for a deeper tile, and to be worth measuring:
# guesses, as no GPU was at hand.
_COARSER, _DEEPER, _MEASURED = 1.05, 1.25, 1.5
_SINGLE_PAYS_BELOW = 0.5  # of what units of 8 visit

tl: Any = None  # triton.language, once `compiled` has found it


@dataclass(frozen=True)
class PackedRows:
    """What is left of a weight `(out, in, kh, kw)`, in the order in which the kernel reads it.

    Args:
        tiles: `(K, depth, lanes)`: the units with a weight that is not zero, filled up with zeros
            to whole tiles at the end of each row of blocks.
        places: int64 `(K * depth / unit,)`: which of the input channels' units each one is, times
            2**32, and its row in the kernel, times 2**16, and its column.
        ends: int32, where every row of blocks begins and ends among the tiles.
        bias: float32, one value an output channel, filled with zeros to whole rows of blocks.
        shape: Shape of the weight.
        unit: Input channels of a unit.
        density: Share of the units that are left.
        pixels: Output positions that one program computes.
    """

    tiles: Tensor
    places: Tensor
    ends: Tensor
    bias: Tensor
    shape: tuple[int, ...]
    unit: int
    density: float
    pixels: int = _PIXELS[0]

    def convolve(
        self, input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], channels_last: bool,
    ) -> Tensor:  # fmt: skip
        """Convolve a batch `(N, in, H, W)` of the weight's dtype and device.

        Raises:
            RuntimeError: If the kernel is larger than the padded input, or the output has 2**31
                positions or more.
            KernelUnavailable: If Triton is missing, or fails to compile or launch.
        """
        images, channels, *size = input.shape
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
        out_size = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride)]
        if min(out_size) < 1:
            raise RuntimeError('executor: the kernel is larger than the padded input.')
        positions, rows = images * out_size[0] * out_size[1], len(self.ends) - 1
        if positions >= 1 << 31:
            raise RuntimeError(f'executor: {positions} output positions, 2**31 or more at once.')
        last = input.contiguous(memory_format=torch.channels_last)
        output = torch.empty(
            (images, self.shape[0], *out_size), dtype=input.dtype, device=input.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )  # fmt: skip
        _, depth, lanes = self.tiles.shape
        launch = compiled()[(rows * -(-positions // self.pixels),)]
        try:
            with torch.cuda.device_of(input):
                launch(
                    last, self.tiles, self.places, self.ends, self.bias, output,
                    positions, rows, channels, self.shape[0], *size, *out_size, *stride, *padding,
                    *dilation, *output.stride(),
                    PIXELS=self.pixels, LANES=lanes, DEPTH=depth, UNIT=self.unit,
                    WHOLE=channels % self.unit == 0,
                )  # fmt: skip
        except Exception as error:  # Triton's own, the driver's, the linker's, the C compiler's
            raise KernelUnavailable(f'Triton failed: {type(error).__name__}: {error}') from error
        return output


def packings(weight: Tensor, bias: Tensor | None = None) -> list[PackedRows]:
    """The ways to compute with a weight that may be the fastest; measuring tells which is.

    Rows of 64, 32 and 16 output channels, each with the coarsest units that hardly leave more to
    visit, and with single input channels where they leave less than half. Several units make a tile
    as deep as `tl.dot` wants it. Hardly any work is wasted on blocks whose output channels are a
    multiple of 16 and whose input channels are one of 8. Others waste some: fewer outputs, such as
    8x8 or 1x16, are filled up to 16; fewer inputs, such as 16x4, up to 8; single ones (16x1) are
    loaded one number at a time. The end of each row of blocks is filled up to a whole tile, of 16
    or more weights of an output channel and up to a quarter more than are left; where a row has
    fewer than 16 left, that is most of it.

    Args:
        weight: `(out, in, kh, kw)`, float32, float16 or bfloat16, on any device.
        bias: `(out,)` or None.

    Example:
        >>> weight = torch.zeros(32, 16, 3, 3)
        >>> weight[:16, :, 1, 2] = 1
        >>> packed = packings(weight)[0]
        >>> tuple(packed.tiles.shape), packed.places.tolist() == [(1 << 16) + 2]
        ((1, 16, 16), True)
    """
    half = weight.element_size() < 4
    candidates = []
    for lanes in _LANES:
        kept = {u: kept_units(weight, lanes, u) for u in (_UNITS if half else _UNITS_FLOAT32)}
        finest = kept[8][0].numel()
        unit = next(u for u in kept if kept[u][0].numel() <= _COARSER * finest)
        candidates += [(unit, *kept[unit])]
        single = kept_units(weight, lanes, 1)
        if single[0].numel() < _SINGLE_PAYS_BELOW * finest:
            candidates += [(1, *single)]
    least = min(units.numel() for _, units, *_ in candidates)
    return [
        replace(packed, pixels=pixels)
        for unit, units, *rest in candidates
        if units.numel() <= _MEASURED * least
        for packed in [_tiled(weight, bias, unit, units, *rest)]
        for pixels in (_PIXELS if half else _PIXELS_FLOAT32)
    ]


def _tiled(
    weight: Tensor, bias: Tensor | None, unit: int, units: Tensor, places: Tensor, counts: Tensor,
    density: float,
) -> PackedRows:  # fmt: skip
    """Put units into tiles as deep as hardly adds to them."""
    for depth in _DEPTHS if weight.element_size() < 4 else _DEPTHS_FLOAT32:
        in_tile = depth // unit
        tiles = -(-counts // in_tile)
        if int(tiles.sum()) * depth <= _DEEPER * len(units) * unit:
            break
    lanes = units.shape[2]
    ends = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
    # Each row of blocks begins with a tile of its own.
    gaps = ends[:-1] * in_tile - (counts.cumsum(0) - counts)
    slots = torch.arange(len(units), device=units.device) + gaps.repeat_interleave(counts)
    filled = units.new_zeros(int(ends[-1]) * in_tile, unit, lanes)
    filled[slots] = units
    filled_places = places.new_zeros(len(filled))
    # One number instead of three, or loading them takes longer than loading the input.
    filled_places[slots] = places[:, 0] << 32 | places[:, 1] << 16 | places[:, 2]
    whole_bias = torch.zeros(len(counts) * lanes, device=weight.device)
    if bias is not None:
        whole_bias[: len(bias)] = bias.detach()
    return PackedRows(
        filled.view(-1, depth, lanes), filled_places, ends.int(), whole_bias,
        tuple(weight.shape), unit, density,
    )  # fmt: skip


@cache
def compiled() -> Callable[..., Any]:
    """The kernel for Triton to compile at its launches, `compiled()[grid](...)`.

    Triton is imported here and nowhere else. With `TRITON_INTERPRET=1` in the environment it
    interprets the kernel instead, on tensors of any device.

    Raises:
        KernelUnavailable: Without Triton, or with one before 3.0.
    """
    global tl
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise KernelUnavailable(
            'triton is not installed: torch for CUDA brings it along on Linux; else see its '
            'documentation for your system.'
        ) from error
    if int(triton.__version__.split('.')[0]) < 3:
        raise KernelUnavailable(f'triton {triton.__version__} is too old: install 3.0 or newer.')
    tl = triton.language
    return triton.jit(_convolve)


def _convolve(
    input, tiles, places, ends, bias, output,
    positions, rows, channels, out_channels, height, width, out_height, out_width,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    image_step, channel_step, row_step, column_step,
    PIXELS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same input, for one row of blocks each.
    program = tl.program_id(0)
    row = program % rows
    position = program // rows * PIXELS + tl.arange(0, PIXELS)
    column = position % out_width
    line = position // out_width % out_height
    image = (position // out_width // out_height).to(tl.int64)
    top = line * stride_h - pad_h
    left = (column * stride_w - pad_w)[:, None]
    corner = input + (((image * height + top) * width)[:, None] + left) * channels
    # What is behind the last position is outside of its image, wherever the kernel looks.
    top = tl.where(position < positions, top, -(1 << 30))[:, None]
    depth = tl.arange(0, DEPTH)
    lane = tl.arange(0, LANES)

    sums = tl.full((PIXELS, LANES), 0, tl.float32)
    for tile in range(tl.load(ends + row), tl.load(ends + row + 1)):
        # One unit is a number, and several are a row of numbers: the rest is the same.
        unit = tile if UNIT == DEPTH else (tile * (DEPTH // UNIT) + depth // UNIT)[None, :]
        place = tl.load(places + unit)
        channel = (place >> 32).to(tl.int32) * UNIT + (depth % UNIT)[None, :]
        down = (place.to(tl.int32) >> 16) * dilation_h
        right = (place.to(tl.int32) & 0xFFFF) * dilation_w
        y, x = top + down, left + right
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        if not WHOLE:
            inside = inside & (channel < channels)
        # Addresses as a sum of a column and a row, which leaves one addition for each.
        address = corner + ((down * width + right) * channels + channel)
        patch = tl.load(address, mask=inside, other=0)
        weights = tl.load(tiles + (tile * DEPTH + depth)[:, None] * LANES + lane[None, :])
        # Of the precisions for float32 the full one; halves have no other.
        sums = tl.dot(patch, weights, sums, input_precision='ieee')

    out_channel = row * LANES + lane
    sums += tl.load(bias + out_channel)[None, :]
    pixel = image * image_step + line.to(tl.int64) * row_step + column.to(tl.int64) * column_step
    target = output + pixel[:, None] + out_channel[None, :] * channel_step
    stored = (position < positions)[:, None] & (out_channel < out_channels)[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=stored)
