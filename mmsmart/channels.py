"""Coupled output channels: what a unit is that can be cut out of a network whole.

A convolution's output channel, the scale and shift of the norm behind it, and everything that a
residual sum, a concatenation, a shared head or a depthwise layer ties to it are one *unit*. Units
with as many places in the same layers form a *group*, in which they are interchangeable.

The ties come from rules (:mod:`mmsmart.dependency`), so what they give is checked: cutting some
units of every group has to leave the same outputs as setting them to zero. A group that can't be
cut stays whole and is listed with its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import Excluded, is_layer
from mmsmart.dependency import ChannelTies, Forward, Side, TiedGroup, trace_ties
from mmsmart.layer_rules import checked_rules, matches
from mmsmart.shrink import NORMS, TRANSPOSED, Kept, cut_channels, in_axis, is_grouped, out_axis

# The masked and the cut network add the same numbers up in another order.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ChannelLayer:
    """How the channels of one layer belong to units.

    Args:
        name: Name of the module inside the model.
        module: A convolution, linear layer or batch norm.
        out: Unit of every output channel, int64 `(out_channels,)`, -1 for one that stays.
        in_: Unit of every input channel, int64 `(in_channels,)`, -1 for one that stays; None for
            norms.
        carries: Whether the soft mask multiplies this layer: norms, and layers that something else
            than a norm follows. A norm would undo what is multiplied before it.
    """

    name: str
    module: nn.Module
    out: Tensor
    in_: Tensor | None
    carries: bool

    def kept(self, mask: Tensor) -> Kept:
        """The channels that stay under a mask over all units, bool `(num_units,)`."""
        return Kept(
            _staying(self.out, mask), None if self.in_ is None else _staying(self.in_, mask)
        )


@dataclass(frozen=True)
class ChannelGroup:
    """Units that sit in the same places of the same layers.

    Args:
        name: The first layer whose output channels they are.
        layers: All layers that they run through: producers, norms and consumers.
        units: Numbers of the units, consecutive.
    """

    name: str
    layers: tuple[str, ...]
    units: range


def find_channels(
    model: nn.Module, forward: Forward, overrides: Sequence[dict[str, Any]] = ()
) -> tuple[list[ChannelLayer], list[ChannelGroup], list[Excluded]]:
    """Find the channels that can be cut, and what leaves with each of them.

    Args:
        model: Any module. Nothing in it is changed.
        forward: Runs a model like this one on one image and gives all its outputs, which keep their
            channels. Layers that it does not run are left whole.
        overrides: Rules by name, `dict(pattern=..., exclude=True)`; see
            :func:`mmsmart.blocks.find_layers`.

    Returns:
        Layers with channels to cut, in the model's order; groups; layers whose output channels all
        stay, with the reason.

    Raises:
        ValueError: For a wrong rule, or if nothing is left to prune.
        ModuleNotFoundError: If Torch-Pruning is not installed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> layers, groups, excluded = find_channels(net, lambda m: [m(torch.zeros(1, 3, 8, 8))])
        >>> groups
        [ChannelGroup(name='0', layers=('0', '1', '2'), units=range(0, 8))]
        >>> excluded
        [Excluded(name='2', reason='its output channels are outputs of the model')]
    """
    by_rule = _excluded_by_rule(model, overrides)
    ties = trace_ties(model, forward)
    _exclude(model, ties, by_rule)
    found = _that_can_be_cut(model, forward, ties)
    excluded = _left_whole(model, ties, found)
    if not found:
        reasons = '; '.join(sorted({item.reason for item in excluded})) or 'it has no convolution'
        raise ValueError(
            f"block: 'channel' finds nothing to cut in {type(model).__name__}: {reasons}."
        )
    groups, begin = [], 0
    for group in found:
        names = tuple(dict.fromkeys(name for name, _ in group.slots))
        producer = next(name for name, end in group.slots if _produces(model, name, end))
        groups.append(ChannelGroup(producer, names, range(begin, begin + group.size)))
        begin += group.size
    return _layers(model, ties, found, groups), groups, excluded


def _excluded_by_rule(model: nn.Module, overrides: Sequence[dict[str, Any]]) -> set[str]:
    names = [name for name, module in model.named_modules() if is_layer(module)]
    excluded: set[str] = set()
    for rule in checked_rules(overrides, coupled=True):
        matched = {name for name in names if matches(rule['pattern'], name)}
        if not matched:
            raise ValueError(
                f'layers: the pattern {rule["pattern"]!r} matches no convolution or linear layer.'
            )
        if 'exclude' in rule:
            excluded = excluded | matched if rule['exclude'] else excluded - matched
    return excluded


def _exclude(model: nn.Module, ties: ChannelTies, by_rule: set[str]) -> None:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        sides = [(name, 'out'), (name, 'in')]
        if name in by_rule:
            ties.exclude(sides[0], 'excluded by a rule of `layers`')
        for parameter in module.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), name)
            for side in sides:
                if owner != name:
                    ties.exclude(side, f'the weight is shared with {owner}')
                    ties.exclude((owner, side[1]), f'the weight is shared with {name}')
                if not parameter.requires_grad:
                    ties.exclude(side, 'frozen: the weight does not require a gradient')
        if module._parameters.get('weight') is None:
            why = 'the weight is computed from other parameters'
            if isinstance(module, NORMS):
                why = 'a norm without scale and shift can not silence a channel'
            for side in sides:
                ties.exclude(side, why)


def _that_can_be_cut(model: nn.Module, forward: Forward, ties: ChannelTies) -> list[TiedGroup]:
    """Groups that leave the outputs as they should be in every trial, found by halving."""
    probe = copy.deepcopy(model).eval()
    _make_telling(probe)
    candidates = [
        group
        for group in ties.groups()
        if group.size > 1 and any(_produces(model, *side) for side in group.slots)
    ]
    trials = _trials([group.size for group in candidates])

    def passes(numbers: list[int], trial: list[Tensor]) -> bool:
        mask = torch.cat([trial[number] for number in numbers])
        groups = [candidates[number] for number in numbers]
        return _cut_equals_zeroed(probe, forward, ties, groups, mask)

    def accept(part: list[int], accepted: list[int], trial: list[Tensor]) -> list[int]:
        if not part or passes([*accepted, *part], trial):
            return part
        if len(part) == 1:
            for side in candidates[part[0]].slots:
                ties.exclude(side, 'cutting the channels that meet here would change the outputs')
            return []
        half = len(part) // 2
        left = accept(part[:half], accepted, trial)
        return left + accept(part[half:], accepted + left, trial)

    numbers, before = list(range(len(candidates))), None
    while numbers != before:  # without one group, others may fail where they passed
        before = numbers
        for trial in trials:
            numbers = accept(numbers, [], trial)
    return [candidates[number] for number in numbers]


def _trials(sizes: list[int]) -> list[list[Tensor]]:
    """Masks of each group's units to try, irregular: a rule that is wrong may suit a regular one.

    First, all groups lose half of their units, by chance. Then some of them lose their first unit:
    of any two groups, there is a trial that cuts one and leaves the other whole.
    """
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randperm(size, generator=generator) >= size // 2 for size in sizes]
    trials = [halves]
    for bit in range(len(sizes).bit_length()):
        chosen = [(number + 1) >> bit & 1 for number in range(len(sizes))]
        trials.append([torch.arange(size) >= one for size, one in zip(sizes, chosen)])
    return trials


def _produces(model: nn.Module, name: str, end: str) -> bool:
    module = model.get_submodule(name)
    return end == 'out' and is_layer(module)


def _make_telling(probe: nn.Module) -> None:
    """Weights that hide no mistake: zeros, as some recipes start from, would."""
    generator = torch.Generator().manual_seed(0)
    for module in probe.modules():
        for key, parameter in module.named_parameters(recurse=False):
            noise = torch.rand(parameter.shape, generator=generator).to(parameter)
            if isinstance(module, NORMS) or parameter.ndim < 2:
                parameter.data = noise + 0.5 if key == 'weight' else noise - 0.5
            elif not bool(parameter.any()):
                parameter.data = (noise - 0.5) / parameter[0].numel() ** 0.5


def _cut_equals_zeroed(
    probe: nn.Module, forward: Forward, ties: ChannelTies, groups: list[TiedGroup], mask: Tensor
) -> bool:
    """Whether cutting the units that are not in the mask gives the outputs that silencing gives."""
    named, begin = [], 0
    for group in groups:
        named.append(ChannelGroup('', (), range(begin, begin + group.size)))
        begin += group.size
    layers = _layers(probe, ties, groups, named)
    zeroed, cut = copy.deepcopy(probe), copy.deepcopy(probe)
    for layer in layers:
        for parameter, pruned in pruned_weights(layer, mask):
            zeroed.get_submodule(layer.name)._parameters[parameter].data.masked_fill_(pruned, 0)
    with torch.no_grad():
        try:
            cut_channels(cut, {layer.name: layer.kept(mask) for layer in layers})
            outputs = list(zip(forward(cut), forward(zeroed), strict=True))
            return all(_close(a, b) for a, b in outputs)
        except Exception:  # whatever a model says to channels that it did not expect
            return False


def _close(a: Tensor, b: Tensor) -> bool:
    scale = b.abs().max().clamp_min(1e-6)
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * scale)


def pruned_weights(layer: ChannelLayer, mask: Tensor) -> list[tuple[str, Tensor]]:
    """Where each parameter of a layer is pruned: its name and a bool tensor of its shape.

    Args:
        layer: The layer.
        mask: The units that stay, bool `(num_units,)`.
    """
    gone = _gone(layer.out, mask)
    weight, bias = layer.module.weight, layer.module.bias
    if isinstance(layer.module, NORMS):
        pruned = gone.to(weight.device)
    else:
        pruned = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        gone_in = _gone(layer.in_, mask)
        if is_grouped(layer.module):  # whole groups, along the first axis
            pruned[gone_in if isinstance(layer.module, TRANSPOSED) else gone] = True
        else:
            pruned.transpose(0, out_axis(layer.module))[gone] = True
            pruned.transpose(0, in_axis(layer.module))[gone_in] = True
    found = [('weight', pruned)]
    return found if bias is None else [*found, ('bias', gone.to(bias.device))]


def _gone(units: Tensor, mask: Tensor) -> Tensor:
    return (units >= 0) & ~mask.bool().cpu()[units.clamp_min(0)]


def _staying(units: Tensor, mask: Tensor) -> Tensor | None:
    return None if bool((units < 0).all()) else (~_gone(units, mask)).nonzero().flatten()


def _layers(
    model: nn.Module, ties: ChannelTies, found: list[TiedGroup], groups: list[ChannelGroup]
) -> list[ChannelLayer]:
    units: dict[Side, Tensor] = {}
    for tied, group in zip(found, groups):
        numbers = torch.tensor(group.units)
        for side, slots in tied.slots.items():
            here = units.setdefault(side, torch.full((ties.size[side],), -1))
            here[slots.flatten()] = numbers.repeat_interleave(slots.shape[1])
    layers = []
    for name, module in model.named_modules():
        out, in_ = units.get((name, 'out')), units.get((name, 'in'))
        if out is None and in_ is None:
            continue
        if out is None:
            out = torch.full((ties.size[name, 'out'],), -1)
        if in_ is None and (name, 'in') in ties.size:
            in_ = torch.full((ties.size[name, 'in'],), -1)
        carries = bool((out >= 0).any()) and name not in ties.normed
        layers.append(ChannelLayer(name, module, out, in_, carries))
    return layers


def _left_whole(model: nn.Module, ties: ChannelTies, found: list[TiedGroup]) -> list[Excluded]:
    cut = {side for group in found for side in group.slots}
    excluded = []
    for name, module in model.named_modules():
        if not is_layer(module) or (name, 'out') in cut:
            continue
        if (name, 'out') in ties.size:
            excluded.append(Excluded(name, ties.reason((name, 'out'))))
        else:
            excluded.append(Excluded(name, 'the traced forward pass does not run it'))
    return excluded
