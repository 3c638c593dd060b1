"""What plans over the weights of layers have in common, whatever decides which blocks stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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

    def gather(self, products: Iterable[Tensor | None], into: Tensor) -> Tensor:
        """Sum what was computed for each of :attr:`weights` over every block, `(num_blocks,)`."""
        for layer, part, product in zip(self.layers, into.split(self.layer_sizes), products):
            if product is not None:
                part.copy_(layer.reduce(product))
        return into

    def first(self, scores: Tensor) -> Tensor:
        """First importance, from scores of the blocks of :attr:`layers`."""
        return scores

    def pruned(self, kept: Tensor) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Every parameter with pruned weights: key, parameter, and where it is pruned, bool."""
        gone = self.spread(~kept)
        return [
            (f'{layer.name}.weight', layer.weight, where) for layer, where in zip(self.layers, gone)
        ]
