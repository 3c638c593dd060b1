"""Which key of the config is wrong, where MMEngine's own error does not say so."""

from __future__ import annotations

import importlib.util
import os.path
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mmengine.registry
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry
from torch import nn

from mmsmart.blocks import is_layer
from mmsmart.masking import BlockMasks

_UNKNOWN_TYPE = re.compile(r'([\w.]+) is not in the [\w.]*::(.+?) registry')
# What NumPy says of a data set of no images, when MMEngine packs it.
_EMPTY = 'need at least one array to concatenate'


@contextmanager
def scope_named(cfg: Config | ConfigDict | dict[str, Any]) -> Iterator[None]:
    """Inside, an error over a type that another toolbox has names `default_scope`.

    Raises:
        ValueError: In place of MMEngine's KeyError, with the scope that was meant.
    """
    try:
        yield
    except KeyError as error:
        unknown = _UNKNOWN_TYPE.search(str(error))
        meant = _scopes_with(*unknown.groups()) if unknown else []
        if not meant:
            raise
        scope = cfg.get('default_scope')
        raise ValueError(
            f'default_scope: {"missing" if scope is None else repr(scope)}, but '
            f'{unknown.group(1)} is a type of {" and ".join(meant)}. Write default_scope = '
            f'{" or ".join(map(repr, meant))}, or give the type its prefix '
            f'({meant[-1]}.{unknown.group(1)}).'
        ) from error


@contextmanager
def data_named(cfg: Config | ConfigDict | dict[str, Any]) -> Iterator[None]:
    """Inside, an error over a file that is not there names the keys that it was put together from.

    Raises:
        FileNotFoundError: In place of the one of the data set, evaluator or checkpoint.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, AssertionError) as error:
        # The error of a worker holds its whole traceback.
        message = str(error).strip().splitlines()[-1] if str(error).strip() else ''
        keys = list(dict.fromkeys(_keys_of(cfg, message)))
        if not keys:
            raise
        raise FileNotFoundError(
            f'{", ".join(keys)}: {message}. Correct the path in the config, or put the data there.'
        ) from error


@contextmanager
def emptiness_named(cfg: Config | ConfigDict | dict[str, Any], loader: str) -> Iterator[None]:
    """Inside, a data set without an image is refused by name.

    Args:
        cfg: The config of the run.
        loader: Key of the loader that is being built.

    Raises:
        ValueError: In place of NumPy's.
    """
    try:
        yield
    except ValueError as error:
        if _EMPTY not in str(error):
            raise
        written = [
            f'{path}.{key} = {value!r}'
            for path, dataset in _datasets(cfg.get(loader), loader)
            for key, value in _found_by(dataset).items()
            if value
        ]
        raise ValueError(
            f'{loader}.dataset: not one image is left of it ({", ".join(written)}). Correct the '
            'folder or the suffix if no file was found; if the annotations were read, name the '
            'classes of `metainfo` as they do.'
        ) from error


def check_checkpoint(
    model: nn.Module, masks: BlockMasks, checkpoint: dict[str, Any], new_layers: bool
) -> list[str]:
    """Refuse a checkpoint of another network, which MMEngine would load in part.

    Args:
        model: The model that it is about to be loaded into.
        masks: The masks of the model.
        checkpoint: What was read.
        new_layers: Whether layers with another number of outputs (classes), and layers that the
            checkpoint lacks, may start untrained.

    Returns:
        The parameters that do.

    Raises:
        ValueError: With parameters, both shapes and the cure.
    """
    state = checkpoint.get('state_dict', checkpoint)
    there = {
        key.removeprefix('module.'): tuple(value.shape)
        for key, value in state.items()
        if hasattr(value, 'shape')
    }
    # Layers alone: position embeddings and the like are resized by models that know how to.
    here = {
        f'{name}.{key}': tuple(parameter.shape)
        for name, module in model.named_modules()
        if is_layer(module)
        for key, parameter in module.named_parameters(recurse=False)
    }
    needed = {f'{layer.name}.weight' for layer in masks.layers}
    differing = [
        key
        for key, shape in here.items()
        if there.get(key, None if key in needed else shape) != shape
    ]
    other_classes = all(key not in there or there[key][1:] == here[key][1:] for key in differing)
    if new_layers and other_classes:
        return differing
    if differing:
        listed = '; '.join(
            f'{key} is {here[key]} in the model and {there.get(key, "missing")} in the checkpoint'
            for key in differing[:4]
        )
        more = f' (and {len(differing) - 4} more)' if len(differing) > 4 else ''
        raise ValueError(
            f'load_from: the checkpoint does not fit the model. {listed}{more}. Load a checkpoint '
            'of the same architecture and classes. Where only the classes differ or layers are '
            'new, give smart.stages.pretrain a share, which trains them first.'
        )
    return []


def _scopes_with(name: str, registry: str) -> list[str]:
    """The installed toolboxes that have a type of this name."""
    roots = [
        root
        for root in vars(mmengine.registry).values()
        if isinstance(root, Registry) and root.name == registry
    ]
    found = []
    for scope in filter(importlib.util.find_spec, MODULE2PACKAGE):
        try:
            if any(root.get(f'{scope}.{name}') is not None for root in roots):
                found.append(scope)
        except RuntimeError:  # MMEngine's way to say no
            continue
    return found


def _keys_of(cfg: Any, message: str) -> Iterator[str]:
    """The keys, with their values, whose path stands in the message."""
    for loader in ('train_dataloader', 'val_dataloader'):
        for path, dataset in _datasets(cfg.get(loader), loader):
            root = dataset.get('data_root') or ''
            below = _files_of(dataset)
            named = [
                f'{path}.{key} = {value!r}'
                for key, value in below.items()
                if os.path.join(root, value) in message
            ]
            if root and root in message and (named or not below):
                yield f'{path}.data_root = {root!r}'
            yield from named
    evaluators = cfg.get('val_evaluator') or []
    for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
        file = evaluator.get('ann_file') if isinstance(evaluator, dict) else None
        if file and file in message:
            yield f'val_evaluator.ann_file = {file!r}'
    if cfg.get('load_from') and str(cfg['load_from']) in message:
        yield f'load_from = {cfg["load_from"]!r}'


def _files_of(dataset: dict[str, Any]) -> dict[str, str]:
    """The keys of a data set that hold paths below its root."""
    prefixes = dataset.get('data_prefix')
    prefixes = prefixes if isinstance(prefixes, dict) else {'': prefixes}
    files = {'ann_file': dataset.get('ann_file')}
    files.update({f'data_prefix.{key}'.rstrip('.'): value for key, value in prefixes.items()})
    return {key: value for key, value in files.items() if value and isinstance(value, str)}


def _found_by(dataset: dict[str, Any]) -> dict[str, Any]:
    """The keys of a data set that decide which images it finds."""
    return {
        'data_root': dataset.get('data_root'),
        **_files_of(dataset),
        'img_suffix': dataset.get('img_suffix'),
        'metainfo.classes': (dataset.get('metainfo') or {}).get('classes'),
    }


def _datasets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data set below a loader that reads files, however it is wrapped."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _datasets(item, f'{path}[{index}]')
    elif isinstance(node, dict):
        if any(key in node for key in ('data_root', 'ann_file', 'data_prefix')):
            yield path, node
        for key in ('dataset', 'datasets'):
            yield from _datasets(node.get(key), f'{path}.{key}')
