"""What plans over the weights of layers have in common, whatever decides which blocks stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mmsmart.blocks import BlockLayer, Excluded


class LayerPlan:
    """Blocks of weights of some layers; each block has an importance and silences its weights.

    Attributes:
        layers: The layers cut into blocks; block vectors follow their order.
        excluded: Weights that stay dense, with the reason.
        layer_sizes: Number of blocks of each layer.
    """

    def __init__(self, layers: Sequence[BlockLayer], excluded: Sequence[Excluded] = ()) -> None:
        self.layers, self.excluded = list(layers), list(excluded)
        self.layer_sizes = [layer.num_blocks for layer in self.layers]

    @property
    def num_blocks(self) -> int:
        return sum(self.layer_sizes)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that the soft mask multiplies."""
        return [layer.weight for layer in self.layers]

    def spread(self, mask: Tensor) -> Iterator[Tensor]:
        """For each of :attr:`weights`, one after the other, what multiplies it, broadcastable."""
        for layer, part in zip(self.layers, mask.split(self.layer_sizes)):
            yield layer.expand(part)

    def scale(self, latent: Sequence[Tensor], mask: Tensor, out: Sequence[Tensor]) -> None:
        """Multiply what stands for each of :attr:`weights` by the mask."""
        for layer, f, w, masked in zip(self.layers, mask.split(self.layer_sizes), latent, out):
            layer.scale(w, f, out=masked)

    def unmask(
        self, latent: Sequence[Tensor], grads: Sequence[Tensor | None], mask: Tensor
    ) -> Tensor:
        """Turn gradients of what :meth:`scale` gave into those of what it was given, in place.

        Returns:
            The gradient of the mask, float32 `(num_blocks,)`: Σ w ∂L/∂(w f) over every block.
        """
        grad_mask = torch.zeros(self.num_blocks, device=mask.device)
        parts = zip(mask.split(self.layer_sizes), grad_mask.split(self.layer_sizes))
        for layer, (f, sums), w, grad in zip(self.layers, parts, latent, grads):
            if grad is not None:
                layer.dot(w, grad, out=sums)
                layer.scale(grad, f, out=grad)
        return grad_mask

    def average(self, scores: Tensor) -> Tensor:
        """Mean score of what one importance silences, from scores of the blocks of the layers."""
        return scores

    def first(self, scores: Tensor) -> Tensor:
        """The same for scores on a common scale, on which it stays."""
        return scores

    def pruned(self, kept: Tensor) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Every parameter with pruned weights: key, parameter, and where it is pruned, bool."""
        return [
            (f'{layer.name}.weight', layer.weight, layer.expand(gone))
            for layer, gone in zip(self.layers, (~kept).split(self.layer_sizes))
        ]
