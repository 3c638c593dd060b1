"""AGP: automated gradual pruning by magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from mmsmart.methods.method import Gradual


@dataclass
class AGP(Gradual):
    """The smallest mean |w| leaves, more and more along a cubic ramp; what has left may come back.

    Source: Zhu and Gupta, arXiv 1710.01878, equation 1, and their code in TensorFlow, whose
    defaults are the exponent 3, a new mask every 10 steps, mean |w| over blocks and the same
    sparsity in every layer.

    Args:
        interval: Steps between two masks.
        scope: 'layer' for the same sparsity in every layer, 'network' for one threshold over all
            mean |w|, each over its layer's mean.
    """

    interval: int = 10
    scope: str = 'layer'
