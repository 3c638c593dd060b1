"""The reader of a suite: which methods are compared, on what, at which blocks and sparsities."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmsmart.compare.plain_yaml import read_yaml
from mmsmart.shipped import configs_folder

_GRID = ('blocks', 'sparsities', 'seeds')
_SUITE = ('tasks', 'methods', *_GRID)
# What every run takes from the grid, and where it is said instead.
_TAKEN = {
    'smart.sparsity': '`sparsities`',
    'smart.block': '`blocks`',
    'smart.method': '`methods`',
    'randomness.seed': '`seeds`',
    'load_from': "the task's `checkpoint`",
}


@dataclass(frozen=True)
class Task:
    """A network and its data: what is pruned, from which weights, and which metric counts.

    Args:
        config: The pruning config.
        metric: Of its validation, the higher the better, such as 'accuracy/top1'.
        dense: Config of the dense network, trained once a seed to start from.
        checkpoint: Where these weights lie already, `{seed}` in it being the seed; nothing dense
            is trained then. With neither, the config has a `load_from` or a pretrain stage.
        options: What differs from `config` in every pruning run, by dotted key.
        dense_options: What differs from `dense`.
        blocks: As `smart.block` takes them.
        sparsities: As `smart.sparsity` takes them, numbers alone.
        seeds: Of dense and pruning runs.
    """

    config: str
    metric: str
    dense: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dense_options: dict[str, Any] = field(default_factory=dict)
    blocks: Sequence[str | list[int]] = ()
    sparsities: Sequence[float] = ()
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Method:
    """A row of the tables: settings of `smart`, and what else differs from the task's config."""

    smart: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Tasks and methods by name, in the order of the file; the first method is the one on trial."""

    name: str
    tasks: dict[str, Task]
    methods: dict[str, Method]


def read_suite(path: str | Path) -> Suite:
    """Read a suite from a YAML file.

    Raises:
        FileNotFoundError: If there is no such file, or a config that it names is missing.
        ValueError: If it is not a suite; the message names the key, what it holds and what may
            stand there.
    """
    path = found(path)
    try:
        return suite_of(read_yaml(path), path.stem)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def suite_of(content: Any, name: str) -> Suite:
    """Make a suite of what its file holds; raises as :func:`read_suite`."""
    content = _mapping('suite', content, _SUITE, ('tasks', 'methods'))
    grid = {key: content[key] for key in _GRID if key in content}
    tasks = {
        label: _task(f'tasks.{label}', {**grid, **_mapping(f'tasks.{label}', task)})
        for label, task in _named('tasks', content['tasks']).items()
    }
    methods = {
        label: _method(label, _mapping(f'methods.{label}', method or {}))
        for label, method in _named('methods', content['methods']).items()
    }
    return Suite(name, tasks, methods)


def found(path: str | Path) -> Path:
    """A path as it was written, from the working folder or else from the folder of `configs/`.

    Raises:
        FileNotFoundError: If it is in neither.
    """
    written = Path(path).expanduser()
    shipped = configs_folder().parent / written
    for candidate in (written, shipped):
        if candidate.is_file():
            return candidate.resolve()
    raise FileNotFoundError(f'{path}: there is no such file, neither here nor as {shipped}.')


def slug(name: str) -> str:
    """A name as a part of a path.

    Example:
        >>> slug('fixed temperature, 0.1')
        'fixed-temperature-0.1'
    """
    return re.sub(r'[^\w.]+', '-', name).strip('-.')


def folder_of(value: Any) -> str:
    """What stands for a name, a block, a sparsity or a seed in the path of a run.

    Example:
        >>> folder_of('2:4'), folder_of([16, 8, 1, 1]), folder_of(0.90), folder_of(0)
        ('2-4', '16x8x1x1', '0.9', '0')
    """
    if isinstance(value, (str, list)):
        return slug(block_name(value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def block_name(block: str | Sequence[int]) -> str:
    """A block as a part of a path and as the title of a table.

    Example:
        >>> block_name([8, 8, 1, 1]), block_name('2:4')
        ('8x8x1x1', '2:4')
    """
    return block if isinstance(block, str) else 'x'.join(str(size) for size in block)


def block_title(block: str) -> str:
    """A block's name in words.

    Example:
        >>> block_title('8x8'), block_title('channel')
        ('blocks of 8x8', 'coupled channels')
    """
    return 'coupled channels' if block == 'channel' else f'blocks of {block}'


def nested(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options by dotted key, as dictionaries inside dictionaries.

    Raises:
        ValueError: If two of them can't both hold, or one is no plain value.

    Example:
        >>> nested('options', {'train_cfg.max_epochs': 5, 'train_cfg': {'val_interval': 1}})
        {'train_cfg': {'max_epochs': 5, 'val_interval': 1}}
    """
    merged: dict[str, Any] = {}
    for key, value in options.items():
        parts = str(key).split('.')
        if not all(parts) or not parts[0].isidentifier():
            raise ValueError(f'{where}: {key!r} is no dotted key such as train_cfg.max_epochs.')
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f'{where}.{key}: expected numbers, text, lists and mappings: {error}.'
            ) from error
        for part in reversed(parts):
            value = {part: value}
        merged = merge(merged, value, where)
    return merged


def merge(base: dict[str, Any], changes: dict[str, Any], where: str = '') -> dict[str, Any]:
    """Changes over a base; with `where`, two values of one key are an error instead."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value, where and f'{where}.{key}')
        elif where and key in merged:
            raise ValueError(f'{where}.{key}: given twice, as {old!r} and as {value!r}.')
        merged[key] = value
    return merged


def _task(where: str, content: dict[str, Any]) -> Task:
    names = [item.name for item in fields(Task)]
    content = _mapping(where, content, names, ('config', 'metric'))
    for key in ('config', 'metric', 'dense', 'checkpoint'):
        value = content.get(key)
        if key in content and not (isinstance(value, str) and value):
            raise ValueError(f'{where}.{key}: expected text, got {value!r}.')
    for key in ('config', 'dense'):
        if key in content:
            found(content[key])
    if 'dense' not in content and content.get('dense_options'):
        raise ValueError(f'{where}.dense_options: there is no `dense` that they could change.')
    for key in ('options', 'dense_options'):
        content[key] = _options(f'{where}.{key}', content.get(key))
    _several(where, content, 'blocks', _is_block, "blocks such as '8x8' or channel, in quotes")
    _several(where, content, 'sparsities', _is_share, 'numbers in (0, 1)')
    _several(where, content, 'seeds', _is_seed, 'integers of at least 0')
    return Task(**content)


def _method(label: str, content: dict[str, Any]) -> Method:
    where = f'methods.{label}'
    options = _options(f'{where}.options', content.pop('options', None))
    for key in ('sparsity', 'block'):
        if key in content:
            raise ValueError(
                f'{where}.{key}: {content[key]!r} belongs to {_TAKEN[f"smart.{key}"]}.'
            )
    smart = nested(where, {'method': label, **content})
    return Method(smart, options)


def _options(where: str, content: Any) -> dict[str, Any]:
    options = nested(where, _mapping(where, content or {}))
    for key, place in _TAKEN.items():
        part, _, name = key.partition('.')
        inner = options.get(part)
        if part in options and (not name or (isinstance(inner, dict) and name in inner)):
            raise ValueError(f'{where}.{key}: say it in {place}.')
    return options


def _mapping(
    where: str, content: Any, allowed: Sequence[str] = (), needed: Sequence[str] = ()
) -> dict[str, Any]:
    """A copy of it, if it is a mapping with these keys."""
    if not isinstance(content, dict):
        raise ValueError(f'{where}: expected a mapping, got {content!r:.80}.')
    for key in content:
        if allowed and key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f' Did you mean {near[0]!r}?' if near else ''
            raise ValueError(f'{where}: unknown key {key!r}; allowed are {list(allowed)}.{hint}')
    for key in needed:
        if key not in content:
            raise ValueError(f'{where}.{key}: is missing; given are {list(content)}.')
    return dict(content)


def _named(where: str, content: Any) -> dict[str, Any]:
    """A mapping that isn't empty, whose names lead to folders of their own."""
    content = _mapping(where, content)
    if not content:
        raise ValueError(f'{where}: is empty; name at least one.')
    for name in content:
        folder = slug(name) if isinstance(name, str) else ''
        if not folder or folder == 'dense':
            raise ValueError(f'{where}: {name!r} is no name for a folder (letters, digits, ., -).')
    _expect_apart(where, content)
    return content


def _several(
    where: str, content: dict[str, Any], key: str, is_one: Callable[[Any], bool], expected: str
) -> None:
    values = content.get(key)
    if not isinstance(values, list) or not values or not all(map(is_one, values)):
        raise ValueError(f'{where}.{key}: expected a list of {expected}, got {values!r}.')
    _expect_apart(f'{where}.{key}', values)


def _expect_apart(where: str, values: Iterable[Any]) -> None:
    """Refuse what would write into one folder."""
    folders: dict[str, Any] = {}
    for value in values:
        folder = folder_of(value)
        if folder in folders:
            raise ValueError(
                f'{where}: {folders[folder]!r} and {value!r} lead to one folder, {folder!r}. '
                'Change one of them, or leave it out.'
            )
        folders[folder] = value


def _is_block(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(size) is int for size in value)
    return isinstance(value, str) and bool(value)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _is_seed(value: Any) -> bool:
    return type(value) is int and value >= 0
