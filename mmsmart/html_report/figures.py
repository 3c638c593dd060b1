"""The pictures of a report: each is drawn from runs, on a light or a dark ground.

One run has its pictures to itself. Of several, curves share their axes, layers a row, and maps and
histograms stand side by side.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mmsmart.drawing import wrapped
from mmsmart.html_report.run import TITLES, Layer, Run, short
from mmsmart.html_report.theme import Theme

WIDTH = 10.8  # inches, 100 of the page's pixels each
MARGIN = 0.05  # a mask this near to 0 or 1 is decided
_MAPS_IN_A_ROW = 4
_COUNT = FuncFormatter(lambda value, _: f'{value:,.0f}')
_PERCENT = FuncFormatter(lambda value, _: f'{100 * value:.3g}%')


def draw_training(theme: Theme, runs: Sequence[Run], metric: str | None) -> Figure:
    """Metric and loss over the iterations, with the stages and the temperature."""
    figure = _figure(6.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, title in ((upper, metric or 'metric'), (lower, 'loss')):
        right = axes.twinx()
        right.set_zorder(0)
        axes.set_zorder(1)
        axes.patch.set_visible(False)
        _draw_stages(theme, runs, right, named=axes is upper)
        for run, colour in zip(runs, _colours(theme, runs)):
            if axes is lower:
                axes.plot(*run.series('loss'), color=colour, linewidth=1.3)
            elif metric:
                axes.plot(*run.scores(metric), 'o-', color=colour, label=run.name, clip_on=False)
            tau = colour if len(runs) > 1 else theme.accent
            right.plot(*run.series('temperature'), '--', color=tau, linewidth=1.3)
        right.set_yscale('log')
        right.minorticks_off()
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        right.set_ylabel('temperature τ (dashed)', color=_only(theme, runs, theme.accent))
        if not any(run.series('temperature')[0] for run in runs):
            right.yaxis.set_visible(False)
        axes.set_ylabel(title)
        axes.grid(axis='y', color=theme.faint, linewidth=0.5, alpha=0.6)
    if len(runs) > 1:
        upper.legend(loc='best')
    ends = [run.timeline.end for run in runs if run.timeline]
    lower.set_xlim(0, max(ends) if ends else None)
    lower.set_xlabel('iteration')
    lower.xaxis.set_major_formatter(_COUNT)
    return figure


def draw_decisions(theme: Theme, runs: Sequence[Run]) -> Figure:
    """Share of blocks that are undecided, and of blocks that changed sides, over the search."""
    figure = _figure(3.3)
    for axes, key, title in zip(
        figure.subplots(1, 2),
        ('undecided', 'moved'),
        ('undecided (mask between 0.05 and 0.95)', 'on the other side than at the start'),
    ):
        for run, colour in zip(runs, _colours(theme, runs)):
            axes.plot(*run.series(key), color=colour, label=run.name)
            if run.timeline and len(runs) == 1:
                axes.set_xlim(run.timeline.search, run.timeline.finetune)
        axes.set_title(title)
        axes.set_ylim(0, None if key == 'moved' else 1.02)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.grid(axis='y', color=theme.faint, linewidth=0.5, alpha=0.6)
        axes.set_xlabel('iteration of the run' if len(runs) > 1 else 'iteration (search)')
        axes.xaxis.set_major_formatter(_COUNT)
    if len(runs) > 1:
        axes.legend(loc='best')
    return figure


def draw_density(theme: Theme, runs: Sequence[Run]) -> Figure:
    """Kept share of every layer, beside what the dense layer costs in parameters and MACs."""
    longest_first = sorted(runs, key=lambda run: -len(run.layers))
    names = list(dict.fromkeys(layer.name for run in longest_first for layer in run.layers))
    tables = [{layer.name: layer for layer in run.layers} for run in runs]
    rows = range(len(names))
    row_height = max(0.21, 0.085 * len(runs))
    figure = _figure(max(2.2, row_height * len(names) + 1.1))
    density, params, macs = figure.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    colours = _colours(theme, runs)
    bars = 0.72 / len(runs)
    for index, (run, table, colour) in enumerate(zip(runs, tables, colours)):
        at = [row + (index - (len(runs) - 1) / 2) * bars for row in rows]
        layers = [table.get(name) for name in names]
        for axes, kept, total in (
            (density, 'density', None),
            (params, 'params_kept', 'params_total'),
            (macs, 'macs_kept', 'macs_total'),
        ):
            dense = [1 if total is None else _number(layer, total) for layer in layers]
            left = [_number(layer, kept) for layer in layers]
            axes.barh(at, dense, bars * 0.94, color=theme.empty)
            axes.barh(at, left, bars * 0.94, color=colour, label=run.name)
            if total and len(runs) == 1:
                for row, one, all_ in zip(rows, left, dense):
                    text = f' {short(one)} of {short(all_)}' if all_ else ''
                    axes.text(all_, row, text, va='center_baseline', fontsize=8)
        for budget in run.budgets:
            if isinstance(budget.get('target_sparsity'), float) and len(run.budgets) == 1:
                density.axvline(
                    1 - budget['target_sparsity'], color=_only(theme, runs, theme.accent) if
                    len(runs) == 1 else colour, linewidth=1.2, linestyle='--',
                )  # fmt: skip
        if len(runs) == 1:
            _name_shares(theme, density, layers)
    density.set_yticks(list(rows), names, fontsize=8.5, family='monospace')
    density.set_ylim(len(names) - 0.5, -0.5)
    density.set_xlim(0, 1)
    density.xaxis.set_major_formatter(_PERCENT)
    for axes, title in (
        (density, 'share kept'),
        (params, 'parameters: kept of dense'),
        (macs, 'MACs: kept of dense'),
    ):
        axes.set_title(title)
        axes.spines['left'].set_visible(False)
        if axes is not density:
            # Room for the figures behind the longest bar.
            axes.set_xlim(0, axes.dataLim.xmax * (1.42 if len(runs) == 1 else 1.02) or 1)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if not any(layer.macs_total for run in runs for layer in run.layers):
        macs.text(0.5, 0.5, 'not counted yet', transform=macs.transAxes, ha='center')
    if len(runs) > 1:
        figure.legend(*density.get_legend_handles_labels(), loc='outside lower center', ncols=6)
    return figure


def draw_masks(theme: Theme, runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """Block maps: a row for each block of output channels, a column for each of input channels."""
    shown = [[_layer(run, name) for name in names] for run in runs]
    if len(runs) == 1:
        cells = [(layer, '') for layer in shown[0]]
        columns = min(_MAPS_IN_A_ROW, len(cells))
    else:
        cells = [
            (layers[i], run.name) for i in range(len(names)) for run, layers in zip(runs, shown)
        ]
        columns = len(runs) if len(runs) <= _MAPS_IN_A_ROW else _MAPS_IN_A_ROW
    lines = math.ceil(len(cells) / columns)
    height = 2.55 if columns > 2 else 3.2
    figure = _figure(height * lines + 0.25)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, cell in zip(grid.flat, [*cells, *[None] * (grid.size - len(cells))]):
        if cell is None or cell[0] is None or cell[0].image is None:
            axes.axis('off')
            continue
        layer, run_name = cell
        draw_map(theme, axes, layer, f'{run_name}\n' if run_name else '')
    figure.supxlabel('input channels, in blocks', fontsize=9)
    figure.supylabel('output channels, in blocks', fontsize=9)
    return figure


def draw_map(theme: Theme, axes: Any, layer: Layer, above: str = '') -> None:
    """One layer's block map."""
    # Few of many positions are easily overlooked: the power makes them stronger.
    axes.imshow(layer.image, cmap=theme.shades, norm=PowerNorm(0.7, 0, 1), aspect='auto')
    kept = f'{layer.density:.0%} of {"×".join(map(str, layer.shape))}'
    axes.set_title(f'{above}{wrapped(layer.name, 32)}\n{kept}', fontsize=8.5, weight='normal')
    axes.tick_params(labelsize=7.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set(visible=True)


def draw_importance(theme: Theme, runs: Sequence[Run]) -> Figure:
    """Histogram of importance minus threshold: what is kept lies on the right."""
    runs = [run for run in runs if run.importances is not None]
    columns = min(len(runs), 3)
    lines = math.ceil(len(runs) / columns)
    figure = _figure(3.3 * lines)
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    ends = [np.percentile(run.importances.distance, (0.1, 99.9)) for run in runs]
    low, high = min(0, *(end[0] for end in ends)), max(0, *(end[1] for end in ends))
    step = (high - low) / (80 if columns == 1 else 40) or 1
    edges = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)  # one of them is 0
    for axes in grid.flat[len(runs) :]:
        axes.axis('off')
    for axes, run in zip(grid.flat, runs):
        at = run.importances
        distance = at.distance.clip(edges[0], edges[-1])
        axes.hist(
            [distance[~at.kept], distance[at.kept]], edges, stacked=True,
            color=[theme.faint, theme.kept],
            label=['pruned side', 'kept side'] if at.temperature else ['pruned', 'kept'],
        )  # fmt: skip
        axes.axvline(0, color=theme.accent, linewidth=1.4)
        if at.temperature:
            width = at.temperature * math.log(1 / MARGIN - 1)
            axes.axvspan(-width, width, color=theme.accent, alpha=0.13, linewidth=0)
            curve = axes.twinx()
            x = np.linspace(low, high, 400)
            mask = 1 / (1 + np.exp(-np.clip(x / at.temperature, -60, 60)))
            curve.plot(x, mask, color=theme.accent, linewidth=1.2)
            curve.set_ylim(0, 1.05)
            curve.set_ylabel(f'mask at τ = {at.temperature:.3g}', color=theme.accent)
        axes.set_title(run.name if len(runs) > 1 else '')
        axes.set_xlabel('importance minus threshold')
        axes.yaxis.set_major_formatter(_COUNT)
        if axes is grid.flat[0]:
            axes.set_ylabel('blocks')
            axes.legend(loc='center left' if abs(low) > high else 'center right')
    return figure


def chosen_layers(runs: Sequence[Run], patterns: Sequence[str] = (), count: int = 8) -> list[str]:
    """Names of the layers whose maps are drawn: those that match, else the largest.

    Raises:
        ValueError: If a pattern matches no pruned layer.
    """
    layers = {layer.name: layer for run in runs for layer in run.layers if layer.image is not None}
    for pattern in patterns:
        if layers and not fnmatch.filter(layers, pattern):
            raise ValueError(
                f'layers: {pattern!r} matches no pruned layer. Names look like '
                f'{", ".join(list(layers)[:3])}; wildcards are `*` and `?`.'
            )
    if patterns:
        return [name for name in layers if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if len(runs) > 1:
        count //= 2
    largest = sorted(layers.values(), key=lambda layer: -layer.params_total)[:count]
    return [name for name, layer in layers.items() if layer in largest]


def _draw_stages(theme: Theme, runs: Sequence[Run], axes: Any, named: bool) -> None:
    """Bands where all runs have the same stages; else a line in each run's colour at their ends."""
    timelines = {run.timeline for run in runs}
    if len(timelines) == 1 and None not in timelines:
        for name, begin, end in runs[0].timeline.spans():
            axes.axvspan(begin, end, color=theme.bands[list(TITLES).index(name)], linewidth=0)
            if named:
                axes.text(
                    (begin + end) / 2, 1.02, TITLES[name], transform=axes.get_xaxis_transform(),
                    ha='center', va='bottom', fontsize=9.5, weight='bold',
                )  # fmt: skip
        return
    for run, colour in zip(runs, _colours(theme, runs)):
        for where in (run.timeline.search, run.timeline.finetune) if run.timeline else ():
            axes.axvline(where, color=colour, linewidth=0.9, linestyle=':')


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    return figure


def _colours(theme: Theme, runs: Sequence[Run]) -> list[str]:
    return [theme.runs[i % len(theme.runs)] for i in range(len(runs))]


def _only(theme: Theme, runs: Sequence[Run], colour: str) -> str:
    return colour if len(runs) == 1 else theme.text


def _number(layer: Layer | None, key: str) -> float:
    return (getattr(layer, key) or 0) if layer is not None else 0


def _layer(run: Run, name: str) -> Layer | None:
    return next((layer for layer in run.layers if layer.name == name), None)


def _name_shares(theme: Theme, axes: Any, layers: Sequence[Layer]) -> None:
    for row, layer in enumerate(layers):
        if layer.density is not None:
            inside = layer.density > 0.85
            axes.text(
                layer.density + (-0.01 if inside else 0.01), row,
                f'{layer.density:.0%}{" (floor)" if layer.at_floor else ""}',
                va='center_baseline', ha='right' if inside else 'left', fontsize=8,
                color=theme.ground if inside else theme.text,
                bbox=None if inside else dict(facecolor=theme.empty, edgecolor='none', pad=0.6),
            )  # fmt: skip
