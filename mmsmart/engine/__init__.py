"""The MMEngine side of mmsmart: the one place that imports mmengine."""

from mmsmart.engine.memory_format import ChannelsLastHook
from mmsmart.engine.model import SmartModel
from mmsmart.engine.optim_wrapper import SmartAmpOptimWrapper, SmartOptimWrapper
from mmsmart.engine.pruning_hook import SmartPruningHook
from mmsmart.engine.runner import SmartRunner

__all__ = [
    'ChannelsLastHook',
    'SmartAmpOptimWrapper',
    'SmartModel',
    'SmartOptimWrapper',
    'SmartPruningHook',
    'SmartRunner',
]
