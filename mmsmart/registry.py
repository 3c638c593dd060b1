"""Registries of mmsmart, children of MMEngine's.

`type='mmsmart.SmartPruningHook'` in a config makes MMEngine import this module by its name, so no
`custom_imports` is needed.
"""

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

_ENGINE = ['mmsmart.engine']
_DATASETS = ['mmsmart.datasets']

DATASETS = Registry('dataset', parent=mmengine_registry.DATASETS, locations=_DATASETS)
HOOKS = Registry('hook', parent=mmengine_registry.HOOKS, locations=_ENGINE)
MODELS = Registry('model', parent=mmengine_registry.MODELS, locations=_ENGINE)
OPTIM_WRAPPERS = Registry(
    'optimizer_wrapper', parent=mmengine_registry.OPTIM_WRAPPERS, locations=_ENGINE
)
RUNNERS = Registry('runner', parent=mmengine_registry.RUNNERS, locations=_ENGINE)
