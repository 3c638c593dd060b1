"""What a probe does to a network: blocks of one part or of all fall silent, and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmsmart.functional import hard_topk
from mmsmart.masking import BlockMasks
from mmsmart.plans import ChannelPlan


@dataclass(frozen=True)
class Part:
    """What is thinned alone: the blocks of a layer, or a group of coupled channels.

    Args:
        name: Name of the layer, or of the group's first layer.
        blocks: Numbers of its blocks among all of the network, consecutive.
        sizes: What each of them holds: weights, or one channel.
    """

    name: str
    blocks: range
    sizes: Tensor

    def thinned(self, importance: Tensor, density: float) -> Tensor:
        """The mask that keeps the top blocks of this part and all others, bool `(num_blocks,)`.

        Args:
            importance: Importance of all blocks of the network.
            density: Share of this part that may stay, in [0, 1]; whole blocks fit from below.
        """
        own = slice(self.blocks.start, self.blocks.stop)
        kept = torch.ones_like(importance, dtype=torch.bool)
        budget = density * float(self.sizes.sum())
        kept[own] = hard_topk(importance[own], budget, self.sizes.to(importance.device)).bool()
        return kept

    def share(self, kept: Tensor) -> float:
        """Share of this part that a mask of the network keeps."""
        own = kept[self.blocks.start : self.blocks.stop].cpu()
        return float(self.sizes[own].sum() / self.sizes.sum())


def parts_of(masks: BlockMasks) -> list[Part]:
    """The layers of a network with masks, or its groups of coupled channels, in their order."""
    if isinstance(masks.plan, ChannelPlan):
        groups = masks.plan.groups
        return [Part(x.name, x.units, torch.ones(len(x.units)).double()) for x in groups]
    parts, begin = [], 0
    for layer in masks.layers:
        blocks = range(begin, begin + layer.num_blocks)
        parts.append(Part(layer.name, blocks, layer.sizes().double()))
        begin = blocks.stop
    return parts


@contextmanager
def silenced(masks: BlockMasks, kept: Tensor) -> Iterator[None]:
    """Inside, the weights of all other blocks are zero; afterwards they are what they were.

    Args:
        masks: Masks of the model that is pruned, dense.
        kept: The blocks that stay, bool `(num_blocks,)`.
    """
    gone = [(weight, where) for _, weight, where in masks.plan.pruned(kept) if bool(where.any())]
    before = [weight.detach().clone() for weight, _ in gone]
    try:
        for weight, where in gone:
            weight.data.masked_fill_(where.to(weight.device), 0)
        yield
    finally:
        for (weight, _), values in zip(gone, before):
            weight.data.copy_(values)


@contextmanager
def fresh_statistics(norms: Sequence[nn.Module], run: Callable[[], None]) -> Iterator[None]:
    """Inside, batch norms hold the statistics of what `run` fed them; afterwards their own again.

    A network that lost blocks is far off with the statistics of the dense one, and the first steps
    of training mend just that: measured so, losses tell what training would start from (EagleEye,
    arXiv 2007.02491).

    Args:
        norms: Batch norms in eval mode, which track statistics.
        run: Feeds some batches to the network, two values a channel at least.
    """
    before = [({k: x.clone() for k, x in norm.named_buffers()}, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        run()
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm, (buffers, momentum) in zip(norms, before):
            norm.eval()
            norm.momentum = momentum
            for key, values in buffers.items():
                norm.get_buffer(key).copy_(values)
