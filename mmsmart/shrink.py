"""Cut channels out of a network, so that what was pruned is gone and not only zero."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm,)

_CUTTABLE = (*CONVOLUTIONS, *TRANSPOSED, *NORMS, nn.Linear)
_FORMAT, _VERSION = 'mmsmart.structure', 1


@dataclass(frozen=True)
class Kept:
    """The channels of one layer that stay, in their order.

    Args:
        out: Kept output channels (of a norm: its channels), int64, or None for all.
        in_: Kept input channels, int64, or None for all. Those of a grouped convolution leave with
            their whole group.
    """

    out: Tensor | None = None
    in_: Tensor | None = None


def is_grouped(module: nn.Module) -> bool:
    """A convolution of several groups, such as a depthwise one."""
    return getattr(module, 'groups', 1) > 1


def out_axis(module: nn.Module) -> int:
    """Axis of the weight that runs over output channels."""
    return 1 if isinstance(module, TRANSPOSED) else 0


def in_axis(module: nn.Module) -> int:
    """Axis of the weight that runs over input channels."""
    return 1 - out_axis(module)


def cut_channels(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Cut all other channels out of the named layers, in place.

    Parameters are replaced by smaller ones, so an optimiser has to be built afterwards.

    Args:
        model: A model with convolutions, linear layers and batch norms of these names.
        kept: What stays, by layer name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> stay = torch.tensor([0, 2, 5])
        >>> cut_channels(net, {'0': Kept(stay), '1': Kept(stay), '2': Kept(None, stay)})
        >>> net(torch.zeros(1, 3, 8, 8)).shape, net[0].weight.shape
        (torch.Size([1, 4, 6, 6]), torch.Size([3, 3, 3, 3]))
    """
    for name, stay in kept.items():
        module = model.get_submodule(name)
        if isinstance(module, NORMS):
            _cut_norm(module, stay.out)
        elif is_grouped(module):
            _cut_groups(module, stay)
        else:
            _cut_parameters(module, stay.out, stay.in_)
            out, in_ = module.weight.shape[out_axis(module)], module.weight.shape[in_axis(module)]
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = out, in_
            else:
                module.out_channels, module.in_channels = out, in_


def _cut_groups(module: nn.Module, stay: Kept) -> None:
    width = module.in_channels // module.groups
    if stay.in_ is None:
        return
    # Along its first axis the weight has the output channels, of a transposed one the input's.
    first = stay.in_ if isinstance(module, TRANSPOSED) else stay.out
    module.weight = _smaller(module.weight, 0, first)
    if module.bias is not None:
        module.bias = _smaller(module.bias, 0, stay.out)
    module.in_channels, module.out_channels = len(stay.in_), len(stay.out)
    module.groups = len(stay.in_) // width


def _cut_parameters(module: nn.Module, out: Tensor | None, in_: Tensor | None) -> None:
    for axis, stay in ((out_axis(module), out), (in_axis(module), in_)):
        if stay is not None:
            module.weight = _smaller(module.weight, axis, stay)
    if out is not None and module.bias is not None:
        module.bias = _smaller(module.bias, 0, out)


def _smaller(parameter: nn.Parameter, axis: int, stay: Tensor) -> nn.Parameter:
    values = parameter.detach().index_select(axis, stay.to(parameter.device))
    return nn.Parameter(values, parameter.requires_grad)


def _cut_norm(module: nn.Module, stay: Tensor | None) -> None:
    if stay is None:
        return
    for key in ('weight', 'bias'):
        if getattr(module, key) is not None:
            setattr(module, key, _smaller(getattr(module, key), 0, stay))
    for key in ('running_mean', 'running_var'):
        old = getattr(module, key)
        if old is not None:
            setattr(module, key, old[stay.to(old.device)].clone())
    module.num_features = len(stay)


def structure_of(model: nn.Module, kept: Mapping[str, Kept]) -> dict[str, Any]:
    """What :func:`shrink` needs to make a stock model the shape of the cut one; plain JSON.

    Args:
        model: The model before the cut.
        kept: What stays, by layer name.
    """
    layers = {}
    for name, stay in kept.items():
        layers[name] = {
            'shape': list(model.get_submodule(name).weight.shape),
            'out': None if stay.out is None else stay.out.tolist(),
            'in': None if stay.in_ is None else stay.in_.tolist(),
        }
    return {'format': _FORMAT, 'version': _VERSION, 'layers': layers}


def read_structure(path: str | Path) -> dict[str, Any]:
    """Read a `structure.json`, checked field by field.

    Raises:
        FileNotFoundError: If there is no such file; a shrunk checkpoint is of no use without.
        ValueError: If it is not one, or damaged; the message names the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: there is no such file. A shrunk checkpoint needs the structure.json that was '
            'written with it; keep both in one folder.'
        )
    try:
        structure = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no text, no JSON, or numbers without end
        raise ValueError(f'{path}: not JSON, or cut short ({error}).') from error
    if not isinstance(structure, dict) or structure.get('format') != _FORMAT:
        raise ValueError(f'{path}: format: expected {_FORMAT!r}; this is another kind of file.')
    if structure.get('version') != _VERSION:
        version = structure.get('version')
        raise ValueError(f'{path}: version: got {version!r:.80}, known is {_VERSION}.')
    layers = structure.get('layers')
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f'{path}: layers: expected an object with an entry for each layer.')
    for name, row in layers.items():
        where = f'{path}: layers.{name:.200}'
        if not isinstance(row, dict) or set(row) != {'shape', 'out', 'in'}:
            raise ValueError(f'{where}: expected the fields shape, out and in.')
        for field in ('shape', 'out', 'in'):
            values = row[field]
            if values is None and field != 'shape':
                continue
            if not isinstance(values, list) or not values or not all(map(_is_index, values)):
                raise ValueError(f'{where}.{field}: expected a list of counts.')
            if field != 'shape' and any(b <= a for a, b in pairwise(values)):
                raise ValueError(f'{where}.{field}: channels must rise.')
    return structure


def shrink(model: nn.Module, structure: dict[str, Any], path: str | Path = 'structure') -> None:
    """Cut a stock model to the shape of a structure, in place; weights are those that remain.

    Args:
        model: The stock model, of the config that was pruned.
        structure: From :func:`structure_of` or :func:`read_structure`.
        path: What error messages call it.

    Raises:
        ValueError: If it is the structure of another model.
    """
    modules = dict(model.named_modules())
    kept = {}
    for name, row in structure['layers'].items():
        module = modules.get(name)
        weight = getattr(module, 'weight', None)
        if weight is None or not isinstance(module, _CUTTABLE):
            raise ValueError(
                f'{path}: layers.{name}: the model has no such layer to cut. It is the structure '
                'of another config.'
            )
        if list(weight.shape) != row['shape']:
            raise ValueError(
                f'{path}: layers.{name}.shape: {row["shape"]} there, {list(weight.shape)} in the '
                'model. It is the structure of another config.'
            )
        kept[name] = Kept(_checked(path, name, row, 'out', _outputs(module)),
                          _checked(path, name, row, 'in', _inputs(module)))  # fmt: skip
        if is_grouped(module) and not _are_whole_groups(module, kept[name]):
            raise ValueError(
                f'{path}: layers.{name}: a convolution of {module.groups} groups loses whole '
                'groups of output and input channels, and `out` and `in` are others.'
            )
    cut_channels(model, kept)


def _checked(
    path: str | Path, name: str, row: dict[str, Any], field: str, count: int
) -> Tensor | None:
    values = row[field]
    if values is None:
        return None
    if values[-1] >= count:
        raise ValueError(
            f'{path}: layers.{name}.{field}: channel {values[-1]}, but the layer has {count}.'
        )
    return torch.tensor(values)


def _are_whole_groups(module: nn.Module, stay: Kept) -> bool:
    if stay.out is None or stay.in_ is None:
        return stay.out is stay.in_
    outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    groups = torch.unique(stay.in_ // inputs)
    return all(
        torch.equal(mine, (groups[:, None] * width + torch.arange(width)).flatten())
        for mine, width in ((stay.out, outputs), (stay.in_, inputs))
    )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _outputs(module: nn.Module) -> int:
    for key in ('out_channels', 'out_features', 'num_features'):
        if hasattr(module, key):
            return getattr(module, key)
    return 0


def _inputs(module: nn.Module) -> int:
    for key in ('in_channels', 'in_features'):
        if hasattr(module, key):
            return getattr(module, key)
    return 0
