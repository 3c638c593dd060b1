"""Which channels of a network can only leave together: Torch-Pruning's dependency graph, by slots.

Torch-Pruning (Fang et al., DepGraph, arXiv 2301.12900) follows one forward pass and tells for every
layer what goes with each of its output channels. Here that is turned into classes of *slots*: a
slot is one channel on the output or the input side of one layer, and a class holds all slots
that leave together.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.shrink import CONVOLUTIONS, NORMS, TRANSPOSED, is_grouped

Forward = Callable[[nn.Module], Sequence[Tensor]]
Side = tuple[str, str]  # layer name, and 'out' or 'in'; norms have 'out' only

OUTPUT = 'its output channels are outputs of the model'


@dataclass(frozen=True)
class TiedGroup:
    """Classes that have as many slots on the same sides.

    Args:
        slots: For each side the channels of every class, int64 `(num_classes, slots on it)`.
    """

    slots: dict[Side, Tensor]

    @property
    def size(self) -> int:
        """Number of classes: how many channels could be cut, one by one."""
        return len(next(iter(self.slots.values())))


class ChannelTies:
    """Classes of slots that leave together, and the sides that have to stay whole.

    Attributes:
        size: Number of channels of every side.
        normed: Layers that nothing but a norm follows.
    """

    def __init__(self, size: dict[Side, int], normed: Iterable[str]) -> None:
        self.size = size
        self.normed = frozenset(normed)
        self._reasons: dict[Side, str] = {}
        self._offset, total = {}, 0
        for side, count in size.items():
            self._offset[side] = total
            total += count
        self._class = torch.arange(total)
        self._edges: list[tuple[Tensor, Tensor]] = []

    def tie(self, a: Side, a_index: Sequence[int], b: Side, b_index: Sequence[int]) -> None:
        """Channels of one side and of another leave together, pair by pair."""
        first = torch.as_tensor(a_index) + self._offset[a]
        second = torch.as_tensor(b_index) + self._offset[b]
        self._edges.append((first, second))

    def exclude(self, side: Side, reason: str) -> None:
        """All channels of a side, and all that is tied to one of them, have to stay."""
        if side in self.size:
            self._reasons.setdefault(side, reason)

    def groups(self) -> list[TiedGroup]:
        """All classes that may leave, grouped, in the order of their first side."""
        classes = self._connected()
        barred = set(torch.cat([self._of(side, classes) for side in self._reasons] or [classes[:0]])
                     .tolist())  # fmt: skip
        places: dict[int, dict[Side, list[int]]] = defaultdict(lambda: defaultdict(list))
        for side in self.size:
            for channel, label in enumerate(self._of(side, classes).tolist()):
                if label not in barred:
                    places[label][side].append(channel)
        alike: dict[tuple[Any, ...], list[dict[Side, list[int]]]] = defaultdict(list)
        for slots in places.values():
            alike[tuple((side, len(index)) for side, index in slots.items())].append(slots)
        return [
            TiedGroup({side: torch.tensor([slots[side] for slots in same]) for side, _ in key})
            for key, same in alike.items()
        ]

    def reason(self, side: Side) -> str:
        """Why the channels of this side have to stay: its own reason, or that of what is tied."""
        classes = self._connected()
        mine = set(self._of(side, classes).tolist())
        if side in self._reasons:
            return self._reasons[side]
        for (name, _), reason in self._reasons.items():
            if mine & set(self._of((name, _), classes).tolist()):
                return f'tied to {name}: {reason}'
        return 'nothing that follows could do without them'

    def _of(self, side: Side, classes: Tensor) -> Tensor:
        begin = self._offset[side]
        return classes[begin : begin + self.size[side]]

    def _connected(self) -> Tensor:
        """Smallest slot of every slot's class: labels sink along the ties until they rest."""
        label = self._class
        if self._edges:
            first, second = (torch.cat(ends) for ends in zip(*self._edges))
            while True:
                low = torch.minimum(label[first], label[second])
                new = label.scatter_reduce(0, first, low, 'amin')
                new = new.scatter_reduce(0, second, low, 'amin')
                new = new[new]
                if torch.equal(new, label):
                    break
                label = new
            self._edges = [(torch.arange(len(label)), label)]
        self._class = label
        return label


def trace_ties(model: nn.Module, forward: Forward) -> ChannelTies:
    """Follow one forward pass of a copy of the model.

    Args:
        model: Any module.
        forward: Runs a model like this one on one image and gives all its outputs.

    Raises:
        ModuleNotFoundError: If Torch-Pruning is not installed.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "block='channel' needs Torch-Pruning: pip install torch-pruning."
        ) from error

    # Frozen layers would end the graph; in eval mode norms learn nothing from the example.
    probe = copy.deepcopy(model).eval().requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter('ignore')
        graph = torch_pruning.DependencyGraph().build_dependency(
            probe,
            None,
            # An operation of its own behind each output, or Torch-Pruning sees only the layer.
            forward_fn=lambda net, _: [output * 1 for output in forward(net)],
            verbose=False,
        )
    names = {module: name for name, module in probe.named_modules()}
    nodes = {module: node for module, node in graph.module2node.items() if module in names}
    size: dict[Side, int] = {}
    for name, module in probe.named_modules():
        if module in nodes:
            size.update({(name, end): count for end, count in _sides(module).items()})
    norms = {name for name, module in probe.named_modules() if isinstance(module, NORMS)}
    ties = ChannelTies(
        size,
        (
            names[module]
            for module, node in nodes.items()
            if node.outputs and {names.get(follower.module) for follower in node.outputs} <= norms
        ),
    )
    for module in nodes:
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            _tie_followers(module, names, graph, ties)
            if is_grouped(module):
                _tie_within_groups(names[module], module, ties)
    return ties


def _sides(module: nn.Module) -> dict[str, int]:
    if isinstance(module, NORMS):
        return {'out': module.num_features}
    if isinstance(module, nn.Linear):
        return {'out': module.out_features, 'in': module.in_features}
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return {'out': module.out_channels, 'in': module.in_channels}
    return {}


def _tie_followers(
    module: nn.Module, names: dict[nn.Module, str], graph: Any, ties: ChannelTies
) -> None:
    root = (names[module], 'out')
    group = graph.get_pruning_group(
        module, graph.get_pruner_of_module(module).prune_out_channels, list(range(ties.size[root]))
    )
    for item in group.items:
        target = item.dep.target.module
        kind = type(target).__name__
        if kind == '_OutputOp':
            ties.exclude(root, OUTPUT)
        elif isinstance(target, nn.Parameter):
            ties.exclude(root, 'tied to a parameter that belongs to no layer that can be cut')
        elif target not in names:
            continue  # a step of the graph without parameters, such as a sum
        else:
            is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
            side = (names[target], 'out' if is_out else 'in')
            if isinstance(target, NORMS):
                side = (names[target], 'out')
            if side not in ties.size:
                if any(True for _ in target.parameters(recurse=False)):
                    ties.exclude(root, _why_not(kind))
                continue
            index, origin = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            if len(index) != len(origin) or int(index.max()) >= ties.size[side]:
                ties.exclude(root, f'{side[0]} does not take them one by one')
                ties.exclude(side, 'its channels are rearranged before they reach it')
            else:
                ties.tie(side, index, root, origin)


def _tie_within_groups(name: str, module: nn.Module, ties: ChannelTies) -> None:
    """A group of a convolution leaves whole: all its input and output channels."""
    for end, channels in (('out', module.out_channels), ('in', module.in_channels)):
        group = torch.arange(channels) // (channels // module.groups)
        first = group * (module.out_channels // module.groups)
        ties.tie((name, end), torch.arange(channels), (name, 'out'), first)


def _why_not(kind: str) -> str:
    if 'Norm' in kind:
        return f'a {kind} behind them mixes channels'
    return f'{kind} can not be cut'
