"""Plans: what shares one importance, what it costs to keep, and which weights it silences.

:class:`mmsmart.BlockMasks` asks its plan for everything that differs between blocks of weights,
each with a cost of its own, N of every M weights, coupled channels, whose costs depend on each
other, and several of these side by side.
"""

from .blocks import BlockPlan
from .channels import ChannelPlan
from .joint import JointPlan, plan_blocks
from .n_of_m import NOfMPlan

Plan = BlockPlan | ChannelPlan | JointPlan | NOfMPlan

__all__ = ['BlockPlan', 'ChannelPlan', 'JointPlan', 'NOfMPlan', 'Plan', 'plan_blocks']
