"""The distinct models of the stock configs, and each one's config as it runs anywhere."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from mmsmart.engine.stock_tools import enable_inheritance

PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')

# What differs between two configs of one model: where its first weights come from, how many classes
# its data has, and how boxes are assigned and filtered.
_NOISE = {
    'init_cfg', 'pretrained', 'num_classes', 'data_preprocessor', 'train_cfg', 'test_cfg',
    'ignore_index', 'class_weight',
}  # fmt: skip


@dataclass(frozen=True)
class StockModel:
    """A model of a package's configs, named by the first config that holds it.

    Args:
        package: The package whose config it is.
        config: Path below the package's folder of configs.
        configs: Number of configs that hold this model.
    """

    package: str
    config: str
    configs: int = 1

    def load(self) -> Config:
        """The config itself."""
        enable_inheritance()
        return Config.fromfile(configs_of(self.package) / self.config)


def configs_of(package: str) -> Path:
    """Folder of the configs that an installed OpenMMLab package ships.

    Raises:
        FileNotFoundError: If the package is not installed, or without its configs.
    """
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent / '.mim' / 'configs' if spec else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f'{package} is not installed, or without its configs.')
    return folder


def distinct_models(
    package: str, pattern: str = '*', progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> list[StockModel]:
    """The models of a package that differ in more than data and schedule, spread over its folders.

    The first of them are one of each architecture, so that any beginning of the list stands for
    the whole. A config that can't be read counts as a model of its own: its trial says why.

    Args:
        package: One of :data:`PACKAGES`.
        pattern: Shell pattern over the path below the folder of configs.
        progress: Wraps the list of paths to show how far it is.
    """
    root = configs_of(package)
    names = sorted(str(path.relative_to(root)) for path in root.rglob('*.py'))
    names = [n for n in names if '_base_' not in Path(n).parts and fnmatch.fnmatch(n, pattern)]
    users: dict[str, list[str]] = {}
    for name in progress(names):
        try:
            config = StockModel(package, name).load()
        except Exception:
            users[name] = [name]
            continue
        if isinstance(config.get('model'), dict):
            users.setdefault(fingerprint(config.model), []).append(name)
    return spread([StockModel(package, same[0], len(same)) for same in users.values()])


def fingerprint(model: dict[str, Any]) -> str:
    """Text that is equal for configs of one model.

    Example:
        >>> one = dict(type='FCN', head=dict(num_classes=19, norm_cfg=dict(type='SyncBN')))
        >>> other = dict(type='FCN', head=dict(num_classes=150, norm_cfg=dict(type='BN')))
        >>> fingerprint(one) == fingerprint(other)
        True
    """
    return json.dumps(_map(model, _without_noise), sort_keys=True, default=str)


def spread(models: Iterable[StockModel]) -> list[StockModel]:
    """Take one model of each folder in turn, until all are taken.

    Example:
        >>> [m.config for m in spread(StockModel('', c) for c in ('a/1', 'a/2', 'b/1'))]
        ['a/1', 'b/1', 'a/2']
    """
    folders: dict[str, list[StockModel]] = {}
    for model in models:
        folders.setdefault(str(Path(model.config).parent), []).append(model)
    rounds = itertools.zip_longest(*folders.values())
    return [model for turn in rounds for model in turn if model is not None]


def stock_model_config(config: Config) -> ConfigDict:
    """The model's config as it runs anywhere: nothing to download, one process, any image size."""
    model = config.model.to_dict()
    if 'data_preprocessor' in config:
        model.setdefault('data_preprocessor', config.data_preprocessor.to_dict())
    model = _map(model, _standing_alone)
    preprocessor = model.get('data_preprocessor') or {}
    if preprocessor.get('type') == 'SegDataPreProcessor':
        preprocessor.update(size=None, size_divisor=1)
        if 'img_size' in model.get('backbone', {}):
            model['backbone']['img_size'] = (128, 128)
    return ConfigDict(model)


def shallower(model: dict[str, Any]) -> str:
    """Give the backbone fewer layers, in place; says what was done, nothing if it has no handle."""
    backbone = model.get('backbone') or model.get('detector', {}).get('backbone') or {}
    kind, depth, arch = backbone.get('type'), backbone.get('depth'), backbone.get('arch')
    if isinstance(depth, int) and depth > 50 and re.match('Res|SE|TridentRes', str(kind)):
        backbone['depth'] = 50
        return f'depth {depth} to 50'
    if isinstance(backbone.get('depths'), (list, tuple)):
        backbone['depths'] = [min(2, int(stage)) for stage in backbone['depths']]
        return 'at most 2 layers a stage'
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(kind) if isinstance(kind, str) else kind
    zoo = getattr(cls, 'arch_zoo', None) or getattr(cls, 'arch_settings', {})
    settings = zoo.get(arch, {}) if isinstance(arch, str) else arch or {}
    if 'num_layers' in settings:
        backbone['arch'] = {**settings, 'num_layers': 2}
        return f'{settings["num_layers"]} layers to 2'
    if isinstance(settings.get('depths'), (list, tuple)):
        backbone['arch'] = {**settings, 'depths': [min(2, stage) for stage in settings['depths']]}
        return 'at most 2 layers a stage'
    return ''


def _standing_alone(node: dict[str, Any]) -> dict[str, Any]:
    node = dict(node)
    if (node.get('init_cfg') or {}) and 'Pretrained' in json.dumps(node['init_cfg'], default=str):
        del node['init_cfg']
    for key in ('pretrained', 'teacher_ckpt', 'batch_augments'):
        if node.get(key):
            node[key] = None
    return {k: 'BN' if v in ('SyncBN', 'MMSyncBN') else v for k, v in node.items()}


def _without_noise(node: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _standing_alone(node).items() if key not in _NOISE}


def _map(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Apply a function to every dict of a tree of dicts and lists, the outermost first."""
    if isinstance(node, dict):
        return {key: _map(value, change) for key, value in change(node).items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_map(item, change) for item in node)
    return node
