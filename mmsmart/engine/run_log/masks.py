"""Masks and importances of a run, from the files in its `work_dir`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsmart.engine.checkpoints import load_checkpoint
from mmsmart.functional import block_grid, block_reduce, block_sizes
from mmsmart.html_report.run import Importances, Layer
from mmsmart.layer_rules import matches


@dataclass
class Checkpoint:
    """What the newest checkpoint of a run tells: nothing of it is on the way to a device.

    Args:
        file: Its name; empty if there is none.
        iteration: Iterations done when it was saved.
        masks: `state_dict` of the masks; empty for a checkpoint without.
        weights: `state_dict` of the model.
        info: What the run remembers of itself, such as its length and the dense metrics.
    """

    file: str = ''
    iteration: int = 0
    masks: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """State of its masks: 'dense', 'soft' or 'hard'; '' without masks."""
        return self.masks.get('state', '')


def newest_checkpoint(folder: Path, since: str = '') -> Checkpoint:
    """The checkpoint that was saved last, or the one before while a run is still writing it.

    Args:
        folder: Folder of the run.
        since: When the run began, such as '20261123_104500'; older ones are of a run before it.
    """
    files = [file for kind in ('epoch', 'iter') for file in folder.glob(f'{kind}_*.pth')]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            read = load_checkpoint(file)
        except (OSError, ValueError):
            continue
        meta = read.get('meta', {})
        if str(meta.get('time', since)) < since:
            continue
        return Checkpoint(
            file.name,
            int(meta.get('iter', 0)),
            (read.get('optimizer') or {}).get('smart', {}).get('masks', {}),
            read.get('state_dict', {}),
            dict(read.get('message_hub', {}).get('runtime_info', {})),
        )
    return Checkpoint()


def with_weights(layers: Sequence[Layer], blocks: dict[str, Any], weights: Any) -> list[Layer]:
    """Layers with block maps, and with what is kept where that is not known, from pruned weights.

    Args:
        layers: The layers.
        blocks: Block on the axes of the weight (or 'channel') and number of groups, by name.
        weights: A state dict whose pruned weights are exactly zero.
    """
    found = []
    for layer in layers:
        weight = weights.get(f'{layer.name}.weight')
        if weight is None or weight.shape != layer.shape or weight.ndim < 2:
            found.append(layer)
            continue
        stays = weight != 0
        image = _image_of(stays, *blocks[layer.name])
        if layer.params_kept is None:
            density = float(stays.float().mean())
            macs = None if layer.macs_total is None else density * layer.macs_total
            layer = replace(layer, params_kept=density * layer.params_total, macs_kept=macs)
        found.append(replace(layer, image=image.numpy()))
    return found


def _image_of(stays: Tensor, block: Sequence[int] | str, groups: int) -> Tensor:
    """Share of the blocks kept at every place of the map; groups stand below each other."""
    if block == 'channel':
        return stays.reshape(*stays.shape[:2], -1).any(-1).float()
    if isinstance(block, str):  # N:M, single weights
        return stays.reshape(*stays.shape[:2], -1).float().mean(-1)
    whole = stays.reshape(groups, -1, *stays.shape[1:])
    kept = block_reduce(whole.long(), (1, *block)) > 0
    return kept.reshape(*kept.shape[:3], -1).float().mean(-1).flatten(0, 1)


def with_masks(layers: Sequence[Layer], checkpoint: Checkpoint) -> list[Layer]:
    """Layers with the block maps and the kept share of a checkpoint's masks, soft or hard.

    Coupled channels and N:M, whose masks can't be told layer by layer from a checkpoint, are left
    as they are. Layers are made from the masks' description where none are given.
    """
    masks, known = checkpoint.masks, {layer.name: layer for layer in layers}
    values = _mask(masks)
    if values is None or _is_channels(masks):
        return list(layers)
    found = {}
    for row, part in zip(masks['layers'], values.split(_lengths(masks, masks['layers']))):
        name, view, block = row
        if not _is_n_of_m(masks, row) and not bool(part.isnan().any()):
            weight = checkpoint.weights.get(f'{name}.weight')
            ndim = len(view) if weight is None else weight.ndim
            layer = known.get(name) or Layer(name, tuple(view[-ndim:]), math.prod(view))
            found[name] = _masked(layer, view, block, part)
    return list({**known, **found}.values())


def _masked(layer: Layer, view: Sequence[int], block: Sequence[int], part: Tensor) -> Layer:
    kept = float((block_sizes(view, block).flatten() * part).sum())
    macs = layer.macs_total
    axes = len(view) - len(layer.shape) + 2  # that of the groups, if any, and the two of channels
    image = part.reshape(*block_grid(view, block)[:axes], -1).mean(-1)
    return replace(
        layer,
        params_kept=kept,
        macs_kept=None if macs is None else macs * kept / layer.params_total,
        image=image.reshape(-1, image.shape[-1]).numpy(),
    )


def _is_channels(masks: dict[str, Any]) -> bool:
    return any(isinstance(item[2], int) for item in masks['layers'])


def _patterns(masks: dict[str, Any]) -> list[str]:
    """The N:M of the masks: their budgets are named like their blocks."""
    parts = dict.fromkeys(row[0] for row in masks.get('budgets', []))
    return [part for part in parts if re.fullmatch(r'\d+:\d+', part)]


def _is_n_of_m(masks: dict[str, Any], row: Sequence[Any]) -> bool:
    """Whether a row of the description is of N:M; of a matrix, a block has two numbers too."""
    return isinstance(row[2], (list, tuple)) and ':'.join(map(str, row[2])) in _patterns(masks)


def _lengths(masks: dict[str, Any], rows: Sequence[Any]) -> list[int]:
    """Number of blocks of each row of the description: units of channels, N:M, blocks."""
    return [
        rest if isinstance(rest, int)
        else math.prod(view) if _is_n_of_m(masks, (name, view, rest))
        else math.prod(block_grid(view, rest))
        for name, view, rest in rows
    ]  # fmt: skip


def _mask(masks: dict[str, Any]) -> Tensor | None:
    """The mask of every block; None while dense."""
    if masks.get('state') == 'hard':
        return masks['kept'].float()
    if masks.get('state') == 'soft':
        return masks['mask']
    return None


def _thresholds(masks: dict[str, Any]) -> Tensor:
    """θ of every block, float64 `(num_blocks,)`; NaN where blocks have no threshold in common.

    A plan has one for all its blocks, or one before those of its layers where floors hold. Plans
    side by side, which have a list of these, are told apart by the parts that budgets name.
    """
    found = masks['method_state']['thresholds']
    layers = masks['layers']
    plans = _plans(masks) if isinstance(found, list) else [layers]
    found = found if isinstance(found, list) else [found]
    if len(plans) != len(found):
        return torch.full_like(masks['importance'], torch.nan, dtype=torch.float64)
    values = []
    for rows, threshold in zip(plans, found):
        lengths = torch.tensor(_lengths(masks, rows))
        threshold = torch.as_tensor(threshold, dtype=torch.float64).flatten()
        if len(threshold) == 1:
            values.append(threshold.expand(int(lengths.sum())))
        elif len(threshold) == 1 + len(rows):
            values.append(threshold[1:].repeat_interleave(lengths))
        else:
            values.append(torch.full((int(lengths.sum()),), torch.nan, dtype=torch.float64))
    return torch.cat(values)


def _plans(masks: dict[str, Any]) -> list[list[Any]]:
    """The description's rows, one list a plan: parts of the network, ordered as their budgets."""
    parts = list(dict.fromkeys(row[0] for row in masks.get('budgets', [])))
    patterns = _patterns(masks)
    plans: dict[str, list[Any]] = {part: [] for part in parts}
    for row in masks['layers']:
        if _is_n_of_m(masks, row):
            plans[':'.join(map(str, row[2]))].append(row)
            continue
        part = next((x for x in parts if x not in patterns and (not x or matches(x, row[0]))), None)
        if part is not None:
            plans[part].append(row)
    return list(plans.values())


def importances(checkpoint: Checkpoint) -> Importances | None:
    """Importance minus threshold of every block; None before the search, or without thresholds.

    Where there is no θ, once the masks are hard or for a rival of SMART, it is put where fewest
    blocks are on the wrong side of it.
    """
    masks = checkpoint.masks
    values = _mask(masks)
    if values is None:
        return None
    importance = masks['importance'].double()
    temperature = masks['method_state'].get('temperature')
    if temperature is not None:
        distance = importance - _thresholds(masks)
    else:
        kept = values > 0.5
        plans = _plans(masks) if len(masks.get('budgets', [])) > 1 else [masks['layers']]
        lengths = [sum(_lengths(masks, rows)) for rows in plans]
        if sum(lengths) != len(kept):
            lengths = [len(kept)]
        parts = zip(importance.split(lengths), kept.split(lengths))
        distance = torch.cat([part - _boundary(part, stays) for part, stays in parts])
    known = distance.isfinite()
    if not bool(known.any()):  # of N:M, each row has a threshold of its own
        return None
    return Importances(distance[known].numpy(), (values > 0.5)[known].numpy(), temperature)


def _boundary(importance: Tensor, kept: Tensor) -> float:
    """Half-way between the two importances between which fewest blocks are on the wrong side.

    Example:
        >>> _boundary(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True]))
        1.5
    """
    rising, order = importance.sort()
    stays = kept[order].long()
    below = torch.cat([stays.new_zeros(1), stays.cumsum(0)])  # kept, though below
    pruned = 1 - stays
    above = pruned.sum() - torch.cat([stays.new_zeros(1), pruned.cumsum(0)])
    at = int((below + above).argmin())
    ends = rising[max(at - 1, 0)], rising[min(at, len(rising) - 1)]
    return float(ends[0] + ends[1]) / 2
