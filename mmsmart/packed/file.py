"""Writing and reading packed-blocks files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.export import complete_or_absent, plain, stock_state
from mmsmart.install import masks_of
from mmsmart.packed.layout import BITS, Cut, checked_cut, pack, unpack

FORMAT = 'mmsmart.packed_blocks'  # the key of our entry in the file's `__metadata__`
VERSION = 1

# What a damaged or hostile file may make us allocate, unless the caller knows better.
_RATIO = 1000  # a network that keeps a thousandth of its weights
_AT_LEAST = 64 * 2**20  # bytes; small files are mostly header


def save_packed(
    state_dict: Mapping[str, Tensor],
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole model into one file, of its pruned weights only the blocks that are left.

    A block is left out when every bit of it is zero, whether a mask made it so or not. Everything
    else, of any dtype, comes back bit for bit from :func:`load_packed`.

    Args:
        state_dict: Of the pruned model, such as `torch.load('pruned.pth')['state_dict']`.
        rows: How its weights are cut: the `layers` of `pruning.json`, of which `name`, `shape`,
            `block` and `groups` are used, and `blocks_kept` to notice weights of another model.
        path: The file to write, by convention `*.safetensors`.
        meta: Further entries, such as `dataset_meta`; see :func:`plain`. NaN becomes null.

    Raises:
        ValueError: If a row does not fit its weight, the weight has more blocks left than its row
            says, or an entry of the state dict is no tensor that safetensors can hold.
        ImportError: If safetensors is not installed.

    Example:
        >>> state = {'fc.weight': torch.eye(4), 'fc.bias': torch.ones(4)}
        >>> row = {'name': 'fc', 'shape': [4, 4], 'block': [2, 2], 'groups': 1}
        >>> folder = getfixture('tmp_path')
        >>> save_packed(state, [row], folder / 'fc.safetensors')
        >>> torch.equal(load_packed(folder / 'fc.safetensors')['fc.weight'], torch.eye(4))
        True
    """
    _, to_bytes = _safetensors()
    cuts = _checked_rows(rows, state_dict)
    tensors: dict[str, Tensor] = {}
    weights, aliases, seen = {}, {}, {}
    # Where a weight has several names, the one that it was cut under is the first.
    for key in sorted(state_dict, key=lambda key: key not in cuts):
        value = _checked_tensor(key, state_dict[key])
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and seen.setdefault(place, key) != key:
            aliases[key] = seen[place]
            continue
        value = value.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)
        if key in cuts:
            cut, most = cuts[key]
            blocks, index = pack(value, cut)
            if isinstance(most, int) and len(index) > most:
                raise ValueError(
                    f'state_dict: {key} has {len(index)} blocks that are not zero, but its row '
                    f'says blocks_kept: {most}. Give the weights and the rows of the same run.'
                )
            weights[key] = cut.as_json()
            tensors |= {f'{key}.blocks': blocks, f'{key}.index': index}
        else:
            tensors[key] = value
    meta = json.loads(json.dumps(plain(dict(meta or {}))), parse_constant=lambda name: None)
    entry = {'version': VERSION, 'weights': weights, 'aliases': aliases, 'meta': meta}
    # Not by the library's own writer: its files can be read by their owner alone.
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, {FORMAT: json.dumps(entry)}))


def save_packed_model(
    model: nn.Module, path: str | Path, meta: Mapping[str, Any] | None = None
) -> None:
    """Write a model whose masks are hard; as :func:`save_packed` of its `pruned.pth`.

    Raises:
        ValueError: If the model has no masks.
        RuntimeError: If its masks are not hard yet.
        ImportError: If safetensors is not installed.
    """
    masks = masks_of(model)
    if masks is None:
        raise ValueError(
            f'model: {type(model).__name__} has no masks, so how its weights are cut is not known. '
            'Give its state dict and the `layers` of pruning.json to save_packed.'
        )
    if masks.state != 'hard':
        raise RuntimeError(f'cannot pack blocks: the masks are {masks.state}, not hard.')
    rows = [
        {
            'name': layer.name,
            'shape': tuple(layer.weight.shape),
            'block': layer.weight_block,
            'groups': layer.groups,
        }
        for layer in masks.layers
    ]
    save_packed(stock_state(model), rows, path, meta)


def load_packed(path: str | Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Read the dense state dict back, bit for bit, on the CPU.

    Sizes are checked before a dense weight is allocated, and indices before it is filled.

    Args:
        path: A file of :func:`save_packed`, or of another writer of docs/packed-blocks.md.
        max_bytes: The most that the packed weights may take together once they are dense, with
            ragged blocks counted as whole ones. By default 1000 times the size of the file, but at
            least 64 MiB: a few bytes of index can stand for a weight of any size.

    Returns:
        All tensors of the model by name, in no particular order. A tensor that the model has under
        several names is one object here too.

    Raises:
        ValueError: If the file is damaged, of another format or of another version, or its dense
            weights would take more than `max_bytes`; names the file and the field.
        ImportError: If safetensors is not installed.
    """
    entry, tensors = _read(path)
    packed = []
    for key, row in entry['weights'].items():
        cut = checked_cut(f'{path}: weights[{key!r:.200}]', row)
        parts = {part: tensors.pop(f'{key}.{part}', None) for part in ('blocks', 'index')}
        for part, tensor in parts.items():
            if tensor is None or tensor.ndim != 1:
                found = 'nothing' if tensor is None else f'shape {tuple(tensor.shape)}'
                raise ValueError(f'{path}: {key}.{part}: expected a vector, got {found}.')
        packed.append((key, cut, parts['blocks'], parts['index']))
    if max_bytes is None:
        max_bytes = max(_RATIO * Path(path).stat().st_size, _AT_LEAST)
    needed = sum(cut.volume * blocks.element_size() for _, cut, blocks, _ in packed)
    if needed > max_bytes:
        raise ValueError(
            f'{path}: weights: dense they would take {needed:,} bytes, more than max_bytes = '
            f'{max_bytes:,}. If that is what the model is known to take, give a larger max_bytes.'
        )
    for key, cut, blocks, index in packed:
        if key in tensors:
            raise ValueError(f'{path}: {key}: the file holds it packed and dense.')
        tensors[key] = unpack(path, key, blocks, index, cut)
    for alias, key in entry['aliases'].items():
        if alias in tensors or not isinstance(key, str) or key not in tensors:
            raise ValueError(
                f'{path}: aliases[{alias!r:.200}]: expected a new name for a tensor of the file, '
                f'got {key!r:.80}.'
            )
    return tensors | {alias: tensors[key] for alias, key in entry['aliases'].items()}


def load_packed_meta(path: str | Path) -> dict[str, Any]:
    """Read the `meta` that was given to :func:`save_packed`; raises as :func:`load_packed`."""
    return _read(path)[0]['meta']


def _checked_rows(
    rows: Iterable[Mapping[str, Any]], state_dict: Mapping[str, Tensor]
) -> dict[str, tuple[Cut, Any]]:
    """For every weight to be packed its cut, and the most blocks that it may have left."""
    cuts: dict[str, tuple[Cut, Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get('name'), str):
            raise ValueError(f'rows[{number}]: expected an entry with a name, got {row!r}.')
        where = f'rows[{number}] ({row["name"]})'
        key = f'{row["name"]}.weight' if row['name'] else 'weight'
        cut = checked_cut(where, row)
        if key not in state_dict or key in cuts:
            problem = 'the row is there twice' if key in cuts else f'no {key} in the state dict'
            raise ValueError(f'{where}: {problem}. Give the weights and the rows of the same run.')
        if tuple(state_dict[key].shape) != cut.shape:
            raise ValueError(
                f'{where}.shape: {cut.shape}, but {key} has {tuple(state_dict[key].shape)}. '
                'Give the weights and the rows of the same run.'
            )
        for name in (f'{key}.blocks', f'{key}.index'):
            if name in state_dict:
                raise ValueError(f'state_dict: {name} is the name that {key} is packed under.')
        cuts[key] = cut, row.get('blocks_kept')
    return cuts


def _checked_tensor(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f'state_dict: {key}: expected a dense tensor, got {type(value).__name__}.')
    if value.is_quantized or value.element_size() not in BITS:
        raise ValueError(f'state_dict: {key}: safetensors has no dtype {value.dtype}.')
    return value


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our entry of the metadata, and all tensors as they are in the file."""
    safe_open, _ = _safetensors()
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # the library's own, and those of torch for impossible tensors
        reason = str(error).splitlines()[0]
        raise ValueError(f'{path}: not a readable safetensors file ({reason}).') from error
    if FORMAT not in metadata:
        raise ValueError(f'{path}: __metadata__: no {FORMAT}, so this is no packed-blocks file.')
    try:
        entry = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: __metadata__[{FORMAT!r}]: not JSON ({error}).') from error
    version = entry.get('version') if isinstance(entry, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f'{path}: version: this reader knows {VERSION}, the file has {version!r:.80}.'
        )
    for key in ('weights', 'aliases', 'meta'):
        if not isinstance(entry.get(key), dict):
            raise ValueError(f'{path}: {key}: expected an object, got {entry.get(key)!r:.200}.')
    return entry, tensors


def _safetensors() -> tuple[Any, Any]:
    """`safe_open` and `save` of the library, which only those who export need to have."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save
    except ImportError as error:
        message = 'packed-blocks files need safetensors: pip install safetensors.'
        raise ImportError(message) from error
    return safe_open, save
