"""Latency tables: what your own hardware takes for a layer, by the blocks or the share it keeps.

A table is a YAML or JSON file, or the same as a dict in the config:

    unit: ms
    layers:
      - pattern: '*'                # later entries win, patterns as in `smart.layers`
        block: 0.002                # for every kept block
        fixed: 0.05                 # beside them, whatever is kept; 0 if not given
      - pattern: backbone.layer4
        curve: [[0, 0.1], [0.5, 0.4], [1, 0.5]]   # density of the layer, its latency
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmsmart.blocks import BlockLayer
from mmsmart.functional import CurveCost, Curves, LinearCost
from mmsmart.layer_rules import matches

_KEYS = {'unit', 'layers'}
_ENTRY_KEYS = {'pattern', 'block', 'fixed', 'curve'}
# Far above what anybody measures by hand: a file beyond it is not a table.
_MOST_BYTES, _MOST_ENTRIES, _MOST_POINTS = 16 * 2**20, 100_000, 10_000


@dataclass(frozen=True)
class LatencyEntry:
    """What the layers of one pattern take.

    Args:
        pattern: Shell pattern over layer names; without a wildcard also everything below the name.
        block: Latency of one kept block, above 0; None if there is a curve.
        fixed: Latency of the layer beside its blocks, 0 or more.
        curve: `(density, latency)` from density 0 to 1, latencies never falling; or None.
    """

    pattern: str
    block: float | None = None
    fixed: float = 0.0
    curve: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class LatencyTable:
    """Latencies by layer name.

    Args:
        entries: Later ones win.
        unit: What latencies are counted in.
    """

    entries: tuple[LatencyEntry, ...]
    unit: str = 'ms'

    def entry(self, name: str) -> LatencyEntry:
        """The last entry whose pattern means this layer.

        Raises:
            ValueError: If none does.
        """
        for entry in reversed(self.entries):
            if matches(entry.pattern, name):
                return entry
        raise ValueError(
            f'latency: no entry of the table means the layer {name!r}. Add one for it, one for all '
            "others with pattern '*', or exclude the layer by a rule of `layers`."
        )

    def of_blocks(self, layers: Sequence[BlockLayer]) -> LinearCost | CurveCost:
        """Latency of these layers as a function of the mask over their blocks.

        Example:
            >>> from mmsmart.blocks import cut_layer
            >>> layers = [cut_layer('fc', torch.nn.Linear(4, 4), (2, 2))]
            >>> table = read_table({'layers': [{'pattern': '*', 'block': 0.5}]})
            >>> table.of_blocks(layers).of(torch.tensor([1.0, 0.0, 1.0, 0.0]))
            1.0
        """
        entries = [self.entry(layer.name) for layer in layers]
        lengths = torch.tensor([layer.num_blocks for layer in layers])
        each = torch.tensor([entry.block or 0.0 for entry in entries], dtype=torch.float64)
        linear = each.repeat_interleave(lengths)
        if all(entry.curve is None and entry.fixed == 0 for entry in entries):
            return LinearCost(linear)
        flat = [entry.curve or ((0.0, entry.fixed), (1.0, entry.fixed)) for entry in entries]
        return CurveCost(
            linear=linear,
            sizes=torch.cat([layer.sizes() for layer in layers]).double(),
            layer=torch.arange(len(layers)).repeat_interleave(lengths),
            curves=Curves.through(flat),
        )

    def of_layers(self, names: Sequence[str]) -> Curves:
        """Latency of these layers as a function of the share of their weights that is left.

        Raises:
            ValueError: If an entry counts blocks.
        """
        curves = []
        for name in names:
            entry = self.entry(name)
            if entry.curve is None:
                raise ValueError(
                    f"latency: the entry {entry.pattern!r} counts blocks, but block='channel' has "
                    f'none in {name}. Give a curve of the latency over the share of weights left.'
                )
            curves.append(entry.curve)
        return Curves.through(curves)


def read_table(source: str | Path | dict[str, Any]) -> LatencyTable:
    """Read a latency table from a file, `.json` or else YAML, or from a dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a table as the module says, naming the file and the entry.

    Example:
        >>> read_table({'unit': 'us', 'layers': [{'pattern': 'head', 'block': 3}]}).entry('head.fc')
        LatencyEntry(pattern='head', block=3.0, fixed=0.0, curve=None)
    """
    if isinstance(source, dict):
        return _table('latency', source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f'latency: no file {str(path)!r}. Give the path of a YAML or JSON table, or the table '
            'itself as a dict.'
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f'latency: {path} is larger than {_MOST_BYTES} bytes: not a table.')
    return _table(f'latency: {path}', _parsed(path))


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix.lower() == '.json':
            return json.loads(text)
        import yaml

        return yaml.load(text, Loader=_plain_loader(yaml))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'latency: {path} can not be read: {error}') from error
    except Exception as error:
        if type(error).__module__.startswith('yaml'):
            raise ValueError(f'latency: {path} is no YAML: {error}') from error
        raise


def _plain_loader(yaml: Any) -> type:
    """A safe loader without aliases, by which a few bytes could unfold to gigabytes."""

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError('aliases (*name) have no place in a table.')
            return super().compose_node(parent, index)

    return PlainLoader


def _table(where: str, content: Any) -> LatencyTable:
    if not isinstance(content, dict) or 'layers' not in content or set(content) - _KEYS:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f'{where}: expected the keys `layers` and perhaps `unit`, got {keys!s:.200}.'
        )
    unit, layers = content.get('unit', 'ms'), content['layers']
    if not isinstance(unit, str) or not 0 < len(unit) <= 20:
        raise ValueError(f"{where}: unit: expected a short string such as 'ms', got {unit!r:.80}.")
    if not isinstance(layers, (list, tuple)) or not 0 < len(layers) <= _MOST_ENTRIES:
        raise ValueError(f'{where}: layers: expected a list of 1 to {_MOST_ENTRIES} entries.')
    entries = [_entry(f'{where}: layers[{i}]', entry) for i, entry in enumerate(layers)]
    return LatencyTable(tuple(entries), unit)


def _entry(where: str, entry: Any) -> LatencyEntry:
    if not isinstance(entry, dict) or set(entry) - _ENTRY_KEYS:
        keys = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f'{where}: expected keys out of {sorted(_ENTRY_KEYS)}, got {keys!s:.200}.')
    pattern = entry.get('pattern')
    if not isinstance(pattern, str) or not 0 < len(pattern) <= 1000:
        raise ValueError(
            f'{where}: pattern: expected a layer name or pattern, got {pattern!r:.80}.'
        )
    if ('block' in entry) == ('curve' in entry):
        raise ValueError(f'{where}: expected either `block` or `curve`, got {sorted(entry)}.')
    if 'curve' in entry:
        if 'fixed' in entry:
            raise ValueError(f'{where}: fixed: a curve has it at density 0. Leave it out.')
        return LatencyEntry(pattern, curve=_curve(f'{where}: curve', entry['curve']))
    block = _number(f'{where}: block', entry['block'])
    if block == 0:
        raise ValueError(f'{where}: block: 0 is free; exclude the layer by a rule of `layers`.')
    return LatencyEntry(pattern, block, _number(f'{where}: fixed', entry.get('fixed', 0)))


def _curve(where: str, points: Any) -> tuple[tuple[float, float], ...]:
    if not isinstance(points, (list, tuple)) or not 2 <= len(points) <= _MOST_POINTS:
        raise ValueError(f'{where}: expected 2 to {_MOST_POINTS} points [density, latency].')
    curve = []
    for index, point in enumerate(points):
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise ValueError(f'{where}[{index}]: expected [density, latency], got {point!r:.80}.')
        curve.append(tuple(_number(f'{where}[{index}]', value) for value in point))
    if curve[0][0] != 0 or curve[-1][0] != 1:
        raise ValueError(
            f'{where}: runs over densities {curve[0][0]:g} to {curve[-1][0]:g}; it must begin at 0 '
            '(what the layer takes with nothing kept) and end at 1 (dense).'
        )
    for index, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(curve), start=1):
        if not x0 < x1:
            raise ValueError(f'{where}[{index}]: density {x1:g} does not rise from {x0:g}.')
        if y1 < y0:
            raise ValueError(
                f'{where}[{index}]: latency falls from {y0:g} to {y1:g} though density rises. '
                'Measure again, or smooth it: an exact budget needs a curve that never falls.'
            )
    if curve[-1][1] == 0:
        raise ValueError(f'{where}: is 0 everywhere; exclude the layer by a rule of `layers`.')
    return tuple(curve)


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'{where}: expected a number of at least 0, got {value!r:.80}.')
    if not 0 <= value < 1e30 or not math.isfinite(value):
        raise ValueError(f'{where}: expected a finite number of at least 0, got {value!r:.80}.')
    return float(value)
