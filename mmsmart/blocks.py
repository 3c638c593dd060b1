"""What a block is, and which layers of a network are cut into blocks.

A block is the smallest set of weights that is kept or pruned whole. Its shape is written
`(out, in, kh, kw)` whatever the layer: :func:`find_layers` turns it to the axes of each layer's
own weight, clips it to the layer's size and lets the blocks at the far edges be smaller, so that no
layer is dropped or padded because it does not divide. Blocks of a grouped convolution never
straddle two groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from mmsmart.functional import (
    block_dot,
    block_expand,
    block_grid,
    block_reduce,
    block_scale,
    block_sizes,
)
from mmsmart.layer_rules import Block, NOfM, checked_rules, matches, read_block

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRUNABLE = (*_CONVOLUTIONS, *TRANSPOSED, nn.Linear)

# Deformable convolutions of mmcv and torchvision, which torch alone does not know: their weight is
# laid out and multiplied like that of a Conv2d, only read at other places of the image.
_DEFORMABLE = ('DeformConv2d', 'ModulatedDeformConv2d')
# Layers that rebuild their weight from the parameter before using it (weight standardisation): a
# zero in the parameter is not a zero in the convolution. Subclasses (mmcv's SAConv2d) do the same.
_STANDARDISED = ('ConvWS2d', 'ConvAWS2d', 'StdConv2d', 'StdConv2dSame', 'ScaledStdConv2d')
_PARAMETRISED = 'the weight is computed from other parameters (a parametrization)'


@dataclass(frozen=True)
class BlockLayer:
    """One layer whose weight is cut into blocks.

    The weight is seen with the groups of a grouped layer as a leading axis, `view_shape`; `block`
    has one entry for each axis of that view.

    Args:
        name: Name of the module inside the model, as in `named_modules()`.
        module: The layer, which owns the parameter `weight`.
        view_shape: Shape in which the weight is cut.
        block: Block on the axes of `view_shape`, every entry between 1 and the axis' length.
        n_of_m: (N, M) if every M single weights along the input axis keep at most N.
    """

    name: str
    module: nn.Module
    view_shape: tuple[int, ...]
    block: tuple[int, ...]
    n_of_m: tuple[int, int] | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that is pruned, in the layer's own shape."""
        return self.module.weight

    @property
    def groups(self) -> int:
        """Number of groups of a grouped convolution; 1 for every other layer."""
        return getattr(self.module, 'groups', 1)

    @property
    def input_axis(self) -> int:
        """Axis of `view_shape` that runs over the input channels (of one group)."""
        first = len(self.view_shape) - self.weight.ndim
        return first if isinstance(self.module, TRANSPOSED) else first + 1

    @property
    def weight_block(self) -> tuple[int, ...]:
        """Block on the axes of the weight itself, without the axis of the groups."""
        return self.block[len(self.block) - self.weight.ndim :]

    @property
    def num_blocks(self) -> int:
        grid = block_grid(self.view_shape, self.block)
        return int(torch.tensor(grid).prod())

    def reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor shaped like the weight over every block; gives `(num_blocks,)`."""
        return block_reduce(values.reshape(self.view_shape), self.block).flatten()

    def expand(self, values: Tensor) -> Tensor:
        """Spread one value a block, `(num_blocks,)`, over a tensor shaped like the weight."""
        values = values.reshape(block_grid(self.view_shape, self.block))
        return block_expand(values, self.view_shape, self.block).reshape(self.weight.shape)

    def scale(self, x: Tensor, values: Tensor, out: Tensor) -> None:
        """Multiply x, shaped like the weight, by one value a block; x may be out itself."""
        grid, shape = block_grid(self.view_shape, self.block), self.view_shape
        block_scale(x.view(shape), values.view(grid), self.block, out=out.view(shape))

    def dot(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Sum the products of two tensors shaped like the weight over every block."""
        grid, shape = block_grid(self.view_shape, self.block), self.view_shape
        block_dot(x.view(shape), y.view(shape), self.block, out=out.view(grid))

    def map_of(self, values: Tensor) -> Tensor:
        """Mean of the block values over kernel positions, `(output blocks, input blocks)`.

        The groups of a grouped layer stand below each other.
        """
        grid = block_grid(self.view_shape, self.block)
        first = len(self.view_shape) - self.weight.ndim
        image = values.float().reshape(*grid[: first + 2], -1).mean(-1)
        if isinstance(self.module, TRANSPOSED):
            image = image.transpose(-1, -2)
        return image.reshape(-1, image.shape[-1])

    def sizes(self) -> Tensor:
        """Number of weights in every block, int64 `(num_blocks,)`."""
        return block_sizes(self.view_shape, self.block).flatten()


@dataclass(frozen=True)
class Excluded:
    """A weight that stays dense, and why."""

    name: str
    reason: str


def find_layers(
    model: nn.Module,
    block: Sequence[int] | str = (16, 8, 1, 1),
    overrides: Sequence[dict[str, Any]] = (),
) -> tuple[list[BlockLayer], list[Excluded]]:
    """Every weight of two or more axes is either cut into blocks or excluded with a reason.

    What becomes of a weight that several modules share is decided where it appears first.

    Args:
        model: Any module. Nothing in it is changed.
        block: `(out, in, kh, kw)`; -1 is the whole axis. A layer with fewer kernel axes drops the
            last entries, one with more repeats the last. Or a string; see
            :func:`mmsmart.layer_rules.read_block`.
        overrides: Rules by name, `dict(pattern=..., block=..., min_density=..., exclude=...)`,
            later rules win. A pattern is a shell pattern over the layer's name (`'head.*'`);
            without a wildcard it also matches everything below that name (`'backbone.layer1'`).

    Returns:
        The layers in the order of `model.named_modules()`, and what was left out.

    Raises:
        ValueError: For a block with a zero or of the wrong length, or with an entry above that
            axis of every layer; for a rule with an unknown key, or a pattern that matches no
            weight; if nothing is left to prune.

    Example:
        >>> layers, excluded = find_layers(nn.Sequential(nn.Conv2d(12, 20, 3), nn.BatchNorm2d(20)))
        >>> layers[0].name, layers[0].block, layers[0].num_blocks
        ('0', (16, 8, 1, 1), 36)
    """
    block = read_block('block', block)
    rules = checked_rules(overrides)
    where = {rule['block']: f'layers[{i}].block' for i, rule in enumerate(rules) if 'block' in rule}
    where[block] = 'block'
    matched = [False] * len(rules)
    layers: list[BlockLayer] = []
    excluded: list[Excluded] = []
    cut_by: dict[Block, list[BlockLayer]] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        layer_block, exclude = block, False
        for index, rule in enumerate(rules):
            if matches(rule['pattern'], name):
                matched[index] = matched[index] or _has_weight(module)
                layer_block = rule.get('block', layer_block)
                exclude = rule.get('exclude', exclude)
        reason = 'excluded by a rule of `layers`' if exclude else _reason_to_exclude(module)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            label = name if key == 'weight' else f'{name}.{key}'
            owner = owners.setdefault(id(parameter), label)
            if owner != label:
                excluded.append(Excluded(label, f'the weight is shared with {owner}'))
            elif key != 'weight' or reason:
                why = reason or 'not the weight of a convolution or linear layer'
                excluded.append(Excluded(label, why))
            else:
                layers.append(cut_layer(name, module, layer_block))
                cut_by.setdefault(layer_block, []).append(layers[-1])
    for rule, found in zip(rules, matched):
        if not found:
            raise ValueError(
                f'layers: the pattern {rule["pattern"]!r} matches no layer with a weight. '
                f'Names look like {_some_names(layers)}; wildcards are `*` and `?`.'
            )
    if not layers:
        reasons = sorted({item.reason for item in excluded}) or ['the model has no weights']
        raise ValueError(
            f'no prunable layer is left in {type(model).__name__}: {"; ".join(reasons)}. '
            'Loosen the rules of `layers`, or unfreeze the layers to be pruned.'
        )
    for wanted, users in cut_by.items():
        if not isinstance(wanted, NOfM):
            _check_size(wanted, users, where[wanted])
    return layers, excluded


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution, deformable ones included, or a linear layer."""
    return isinstance(module, PRUNABLE) or _derives_from(module, _DEFORMABLE)


def _derives_from(module: nn.Module, names: Sequence[str]) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)


def _has_weight(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _reason_to_exclude(module: nn.Module) -> str | None:
    """Why the weight of this module can't be cut into blocks, or None if it can."""
    if isinstance(module, ParametrizationList):
        return _PARAMETRISED
    if not is_layer(module):
        return f'{type(module).__name__} is not a convolution or linear layer'
    weight = module._parameters.get('weight')
    if weight is None:
        return _PARAMETRISED
    if _derives_from(module, _STANDARDISED):
        return 'weight standardisation turns pruned zeros into other values'
    if not weight.requires_grad:
        return 'frozen: the weight does not require a gradient'
    if getattr(module, 'groups', 1) > 1 and module.groups == module.in_channels:
        return 'depthwise: a filter that is one channel deep holds no block'
    return None


def _view_shape(module: nn.Module) -> tuple[int, ...]:
    shape, groups = tuple(module.weight.shape), getattr(module, 'groups', 1)
    # Both kinds of convolution keep the groups together along the weight's first axis.
    return shape if groups == 1 else (groups, shape[0] // groups, *shape[1:])


def _block_on_axes(block: Sequence[int], module: nn.Module) -> tuple[int, ...]:
    out_block, in_block, *kernel = block
    axes = module.weight.ndim - 2
    last = kernel[-1] if kernel else -1
    kernel = (kernel + [last] * axes)[:axes]
    ends = (in_block, out_block) if isinstance(module, TRANSPOSED) else (out_block, in_block)
    lead = () if getattr(module, 'groups', 1) == 1 else (1,)
    return (*lead, *ends, *kernel)


def _check_size(block: tuple[int, ...], layers: Sequence[BlockLayer], key: str) -> None:
    for axis, entry in enumerate(block):
        sizes = [shape[axis] for shape in map(_written_shape, layers) if axis < len(shape)]
        if sizes and entry > max(sizes):
            raise ValueError(
                f'{key}: {entry} in {block} is larger than every layer it applies to (that axis is '
                f'at most {max(sizes)}). Choose a smaller block, or -1 for a whole axis.'
            )


def _written_shape(layer: BlockLayer) -> tuple[int, ...]:
    """Shape in which the layer is cut, in the order (out, in, kh, kw) of a written block."""
    first, second, *kernel = layer.view_shape[-layer.weight.ndim :]
    swapped = isinstance(layer.module, TRANSPOSED)
    return (second, first, *kernel) if swapped else (first, second, *kernel)


def cut_layer(name: str, module: nn.Module, block: Block) -> BlockLayer:
    """The weight of one layer in blocks `(out, in, kh, kw)`, clipped to its size, or N of M."""
    if isinstance(block, NOfM):
        return replace(cut_layer(name, module, (1, 1, 1)), n_of_m=(block.n, block.m))
    view_shape = _view_shape(module)
    clipped = tuple(
        size if wanted == -1 else min(wanted, size)
        for wanted, size in zip(_block_on_axes(block, module), view_shape)
    )
    return BlockLayer(name, module, view_shape, clipped)


def _some_names(layers: Sequence[BlockLayer]) -> str:
    names = [layer.name for layer in layers[:2]] + [layer.name for layer in layers[-1:]]
    return ', '.join(repr(name) for name in dict.fromkeys(names)) or '(no layer is prunable)'
