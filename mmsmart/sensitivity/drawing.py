"""The picture of `sensitivity.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmsmart.export import complete_or_absent

# Of the rise that is allowed: where the colours of the heat map are full.
_FULL_COLOUR = 30


def draw_sensitivity(report: dict[str, Any], path: str | Path) -> None:
    """Draw the contents of `sensitivity.json`: layers by density, and the curves of the whole net.

    Blue stays within the rise that is allowed, red goes beyond it, white is just that rise.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(6.0, 0.2 * len(report['layers']) + 1.8)
    figure = Figure(figsize=(14, height), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    _draw_layers(left, report)
    # The curves keep their shape beside a map of any height.
    rest = max(height - 1.0 - 4.6, 0.01)
    grid = right.add_gridspec(2, 1, height_ratios=(4.6, rest))
    _draw_network(right.add_subplot(grid[0]), report)
    figure.suptitle(
        f'Loss without training, {report["images"]} {report["data"]} images: {report["loss"]:.4g} '
        f'dense, at most {report["loss"] + report["allowed"]:.4g} allowed'
    )
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_layers(figure: Any, report: dict[str, Any]) -> None:
    from matplotlib.colors import LogNorm

    layers, allowed = report['layers'], report['allowed']
    densities = sorted({x['density'] for row in layers for x in row['losses']}, reverse=True)
    norm = LogNorm(allowed / _FULL_COLOUR, allowed * _FULL_COLOUR, clip=True)
    image = torch.full((len(layers), len(densities)), float('nan'))
    axes = figure.subplots()
    for i, row in enumerate(layers):
        for point in row['losses']:
            j, loss = densities.index(point['density']), point['loss']
            rise = float('inf') if loss is None else loss - report['loss']
            image[i, j] = min(max(rise, norm.vmin), norm.vmax)
            # Read against a full colour, or against a pale one.
            pale = norm.vmin * 4 < image[i, j] < norm.vmax / 4
            axes.text(
                j, i, f'{rise:+.2g}' if abs(rise) >= allowed / 100 else '0', ha='center',
                va='center', fontsize=6.5, color='0.1' if pale else 'white',
            )  # fmt: skip
    drawn = axes.imshow(
        image.numpy(), cmap='RdBu_r', norm=norm, aspect='auto', interpolation='nearest'
    )
    axes.set_yticks(range(len(layers)), [row['name'] for row in layers], fontsize=7)
    axes.set_xticks(range(len(densities)), [f'{density:g}' for density in densities])
    axes.set(xlabel='density of this layer alone', title='Rise of the loss, first layer on top')
    bar = figure.colorbar(drawn, ax=axes, location='bottom', shrink=0.6, aspect=40, pad=0.01)
    bar.set_label('rise of the loss (white: what is allowed)', fontsize=8)


def _draw_network(axes: Any, report: dict[str, Any]) -> None:
    for index, (resource, curves) in enumerate(report['network'].items()):
        for name, points in curves.items():
            shown = [x for x in points if x['loss'] is not None]
            axes.plot(
                [0, *(x['sparsity'] for x in shown)],
                [report['loss'], *(x['loss'] for x in shown)],
                marker='o', markersize=4, color=f'C{index}',
                linestyle='-' if name == 'protected' or len(curves) == 1 else ':',
                label=f'{resource}, {name}' if len(curves) > 1 else resource,
            )  # fmt: skip
        found = report['proposals'][resource]['sparsity']
        axes.axvline(found, color=f'C{index}', linewidth=1, linestyle='--')
    axes.axhline(report['loss'] + report['allowed'], color='tab:red', linewidth=1, label='allowed')
    if report['loss'] > 0:
        axes.set_yscale('log')
    axes.set(
        xlim=(0, 1),
        xlabel='sparsity of the whole net (dashed: proposed)',
        ylabel='loss',
        title='Global top-k by the first importance',
    )
    axes.grid(alpha=0.3)
    axes.legend()
