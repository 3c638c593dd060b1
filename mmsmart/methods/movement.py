"""Movement pruning: straight-through scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmsmart.methods.method import Gradual
from mmsmart.plans import Plan


@dataclass
class Movement(Gradual):
    """Scores that fall where the weights of a block move towards zero: S ← S - lr Σ w ∂L/∂w.

    The mask is hard and cuts more and more along a cubic ramp, anew at every step; the gradient
    passes straight through it to the scores, which start at zero.

    Source: Sanh et al., arXiv 2005.07683; scores of blocks: Lagunas et al., arXiv 2109.04838. Their
    code trains the scores with AdamW at a learning rate of 0.01 (`smart.importance.lr`) and cuts
    the same share of every matrix.

    Args:
        interval: Steps between two masks.
        scope: 'layer' for the same sparsity in every layer, 'network' for one threshold.
    """

    scope: str = 'layer'

    learns = True
    init = 'zero'

    def backward(self, plan: Plan, importance: nn.Parameter, grad_mask: Tensor) -> None:
        importance.grad = grad_mask

    def score(self, plan: Plan, importance: nn.Parameter) -> None:
        pass  # its optimiser has moved it
