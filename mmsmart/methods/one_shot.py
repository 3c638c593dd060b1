"""Methods that cut once, as the search begins, and fine-tune what is left from there on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmsmart.methods.method import Method, within_layers
from mmsmart.plans import Plan


class OneShot(Method):
    """The order of the blocks is known before any training."""

    one_shot = True


@dataclass
class Magnitude(OneShot):
    """The largest mean |w| of a block over its layer's mean, one threshold over the network.

    Source: Han et al., arXiv 1506.02626; global and layer-wise thresholds are compared in Blalock
    et al., arXiv 2003.03033. It has no setting.
    """


@dataclass
class Uniform(OneShot):
    """The largest mean |w| of a block, the same share of every layer.

    Source: the uniform baseline of Gale et al., arXiv 1902.09574. It has no setting.
    """

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        return within_layers(plan, importance)


@dataclass
class Wanda(OneShot):
    """The largest mean |w| times the norm of the input it meets, the same share of every layer.

    Source: Sun et al., arXiv 2306.11695, and their code, which compares within each output; a
    block holds several outputs, so here it is within each layer. Theirs does not train afterwards
    and recomputes the inputs of each layer behind pruned ones; here all inputs are those of the
    dense network, and training goes on as for every method. It has no setting.
    """

    init = 'activation'

    def ranking(self, plan: Plan, importance: Tensor) -> Tensor:
        return within_layers(plan, importance)


@dataclass
class Random(OneShot):
    """Any blocks, by lot: what every method has to beat.

    Source: Liu et al., arXiv 2202.02643, who prune before training; here the dense network is
    trained already. It has no setting.
    """

    init = 'random'
