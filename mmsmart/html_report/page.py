"""The page: pictures on both grounds, tables, and nothing that has to be fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mmsmart.export import complete_or_absent
from mmsmart.html_report.run import TITLES, Run, main_metric, short
from mmsmart.version import __version__

_TEMPLATE = Path(__file__).with_name('page.html')
_NAMES = {'params': 'parameters', 'macs': 'MACs', 'latency': 'latency'}
_COSTS = tuple(_NAMES)
_DPI = 200  # twice the page's pixels, for screens that have them


def write_report(
    runs: Sequence[Run],
    path: str | Path,
    layers: Sequence[str] = (),
    metric: str | None = None,
    command: str = '',
    step: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Write one HTML file that holds everything, and its pictures as PNG into a folder beside it.

    Args:
        runs: One run, or several to be compared.
        path: The HTML file; the pictures go into the folder of that name without the ending.
        layers: Shell patterns of the layers whose masks are drawn; the largest if not given.
        metric: The metric that is drawn; the usual one of the task if not given.
        command: The command that makes this page, to be shown on it.
        step: Called with a name before each picture.

    Returns:
        The HTML file and the pictures.

    Raises:
        ValueError: If there is no run, no layer matches a pattern, no run has the metric, or the
            path has no ending.
    """
    from jinja2 import Environment, StrictUndefined

    if not runs:
        raise ValueError('runs: expected at least one run, got none.')
    path = Path(path)
    if not path.suffix:
        raise ValueError(f'out: {path} has no ending, such as {path}.html; pictures go to {path}/.')
    pictures, files = _draw(runs, path, layers, metric, step)
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(
        count=_count, percent=_percent, change=_change, cost=_cost, counted=_name
    )
    page = environment.from_string(_TEMPLATE.read_text(encoding='utf-8')).render(
        runs=runs,
        pictures=pictures,
        metrics=_side_by_side(runs),
        excluded=[_by_reason(run) for run in runs],
        tiles=[_tiles(run) for run in runs],
        titles={**TITLES, 'finished': 'finished'},
        version=__version__,
        command=command,
        written=f'{datetime.now():%Y-%m-%d %H:%M}',
    )
    with complete_or_absent(path) as temporary:
        temporary.write_text(page, encoding='utf-8')
    return [path, *files]


def _draw(
    runs: Sequence[Run],
    path: Path,
    layers: Sequence[str],
    metric: str | None,
    step: Callable[[str], None],
) -> tuple[dict[str, dict[str, str]], list[Path]]:
    """Data URIs by section and theme, and the files."""
    from mmsmart.html_report import figures
    from mmsmart.html_report.theme import DARK, LIGHT

    known = {key for run in runs for _, row in run.validation for key in row}
    if metric and metric not in known:
        raise ValueError(f'metric: no run has {metric!r}, only {", ".join(sorted(known))}.')
    names = figures.chosen_layers(runs, layers)
    drawings = {
        'training': (figures.draw_training, runs, metric or main_metric(runs)),
        'decisions': (figures.draw_decisions, runs),
        'density': (figures.draw_density, runs),
        'masks': (figures.draw_masks, runs, names),
        'importance': (figures.draw_importance, runs),
    }
    folder = path.with_suffix('')
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, dict[str, str]] = {}
    files = []
    for section, (draw, *arguments) in drawings.items():
        if all(section in run.missing for run in runs):
            continue
        for theme in (LIGHT, DARK):
            step(f'{section}, {theme.name}')
            with theme.applied():
                png = _png(draw(theme, *arguments))
            ending = '' if theme is LIGHT else f'-{theme.name}'
            files.append(folder / f'{section}{ending}.png')
            with complete_or_absent(files[-1]) as temporary:
                temporary.write_bytes(png)
            uri = f'data:image/png;base64,{base64.b64encode(png).decode()}'
            pictures.setdefault(section, {})[theme.name] = uri
    return pictures, files


def _png(figure: Any) -> bytes:
    """The picture in 256 colours, which is all that it needs and a third of the bytes."""
    from PIL import Image

    canvas, small = io.BytesIO(), io.BytesIO()
    figure.savefig(canvas, dpi=_DPI, format='png')
    Image.open(canvas).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(
        small, 'png', optimize=True, dpi=(_DPI, _DPI)
    )
    return small.getvalue()


def _before_and_after(run: Run) -> dict[str, dict[str, Any]]:
    """Rows by name; of a run still going, after is its last validation."""
    after = run.pruned or (dict(run.validation[-1][1]) if run.validation else {})
    keys = dict.fromkeys([*_COSTS, *run.dense, *after])
    return {
        _NAMES.get(key, key): {
            'dense': run.dense.get(key),
            'pruned': after.get(key),
            'cost': key in _COSTS,
        }
        for key in keys
        if _is_number(run.dense.get(key)) or _is_number(after.get(key))
    }


def _side_by_side(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every name with a row of each run."""
    tables = [_before_and_after(run) for run in runs]
    nothing = {'dense': None, 'pruned': None, 'cost': False}
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name, nothing) for table in tables]) for name in names]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures that matter most: heading, value, remark."""
    rows = _before_and_after(run)
    end = run.timeline.end if run.timeline else None
    tiles = [
        (
            'state',
            'finished' if run.finished else TITLES[run.stage],
            f'iteration {run.iteration:,}' + (f' of {end:,}' if end else ''),
        )
    ]
    for budget in run.budgets[:1]:
        if budget.get('kept') is not None and budget.get('total'):
            removed = _percent(1 - budget['kept'] / budget['total'], 2)
            asked = _percent(budget.get('target_sparsity'))
            tiles.append(('removed', removed, f'of {_name(budget)}; asked {asked}'))
        elif _is_number(budget.get('target_sparsity')):
            asked = _percent(budget['target_sparsity'])
            tiles.append(('to be removed', asked, f'of {_name(budget)}'))
    for key in filter(None, (main_metric([run]), *_COSTS)):
        row = rows.get(_NAMES.get(key, key), {})
        after, before = row.get('pruned'), row.get('dense')
        if _is_number(after):
            write = short if key in _COSTS else _count
            remark = f'dense {write(before)}' if _is_number(before) else ''
            tiles.append((_NAMES.get(key, key), write(after), remark))
    return tiles


def _name(budget: dict[str, Any]) -> str:
    """What a budget counts, in words."""
    what = _NAMES.get(budget.get('resource', ''), 'the resource')
    part = budget.get('part', '')
    return f'{what}{", " if ":" in part else " of "}{part}' if part else what


def _by_reason(run: Run) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, reason in run.excluded or []:
        found.setdefault(reason, []).append(name)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any) -> str:
    """A figure for a table: counts whole, metrics with as many digits as they are worth."""
    if not _is_number(value):
        return '–'
    whole = isinstance(value, int) or abs(value) >= 1000
    return f'{value:,.0f}' if whole else f'{value:.{_digits(value)}f}'


def _digits(value: float) -> int:
    return 2 if abs(value) >= 10 else 3


def _cost(value: Any) -> str:
    """A cost, whole or not, from parameters to milliseconds."""
    if not _is_number(value):
        return '–'
    return f'{value:,.1f}'.removesuffix('.0') if abs(value) >= 1000 else f'{value:.4g}'


def _percent(value: Any, digits: int = 1) -> str:
    if not _is_number(value):
        return '–'
    text = f'{100 * value:.{digits}f}'
    return f'{text.rstrip("0").rstrip(".") if "." in text else text} %'


def _change(row: dict[str, Any]) -> str:
    """What became of it: costs in per cent, metrics in points."""
    before, after = row.get('dense'), row.get('pruned')
    if not _is_number(before) or not _is_number(after):
        return ''
    if row['cost']:
        return f'{100 * (after / before - 1):+.1f} %'.replace('-', '−') if before else ''
    return f'{after - before:+.{_digits(before)}f}'.replace('-', '−')
