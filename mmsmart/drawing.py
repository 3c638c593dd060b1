"""A picture of where a network was cut: `pruning.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mmsmart.channels import pruned_weights
from mmsmart.export import complete_or_absent
from mmsmart.masking import BlockMasks
from mmsmart.plans import ChannelPlan
from mmsmart.report import weighted_rows

_MAP_COLUMNS = 4


def draw_report(report: dict[str, Any], masks: BlockMasks, path: str | Path) -> None:
    """Draw where the network was cut: kept density of every layer, and the largest layers' blocks.

    A block map has a row for each block of output channels and a column for each block of input
    channels; its shade is the share kept over the positions of the kernel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = weighted_rows(report)
    height = max(5.0, 0.24 * len(rows) + 1.5)
    # The maps fill the height that the bars take, in lines of about two inches.
    largest = sorted(rows, key=lambda row: -row['params_total'])[: _MAP_COLUMNS * int(height / 2.1)]
    chosen = [row for row in rows if row in largest]
    figure = Figure(figsize=(13, height), layout='constrained')
    FigureCanvasAgg(figure)
    bars, maps = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    _draw_densities(bars.subplots(), report)
    _draw_block_maps(maps, chosen, masks)
    figure.suptitle(
        f'{report["achieved_sparsity"]:.1%} of the prunable {masks.unit} removed: '
        f'{report["kept"]:,.0f} kept of a budget of {report["budget"]:,.0f}'
    )
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_densities(axes: Any, report: dict[str, Any]) -> None:
    rows = weighted_rows(report)
    what = report['resource']
    density = [row[f'{what}_kept'] / max(row[f'{what}_total'], 1) for row in rows]
    axes.barh(range(len(rows)), [1.0] * len(rows), color='0.92')
    axes.barh(range(len(rows)), density, color='tab:blue')
    for i, (row, share) in enumerate(zip(rows, density)):
        label = f'{share:.0%} of {row[f"{what}_total"]:,}'
        axes.text(0.99, i, label, va='center', ha='right', fontsize=8)
    axes.axvline(1 - report['target_sparsity'], color='tab:red', linewidth=1)
    axes.set_yticks(range(len(rows)), [row['name'] for row in rows], fontsize=8)
    axes.set(
        xlim=(0, 1),
        ylim=(len(rows) - 0.5, -0.5),
        xlabel=f'share of {report["budgets"][0]["unit"]} kept (red: network target)',
        title='Kept density, first layer on top',
    )


def _draw_block_maps(figure: Any, chosen: list[dict[str, Any]], masks: BlockMasks) -> None:
    images, unit = _images(masks), 'block of '
    if isinstance(masks.plan, ChannelPlan):
        unit = ''
    columns = min(_MAP_COLUMNS, len(chosen))
    grid = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.axis('off')
    for axes, row in zip(grid.flat, chosen):
        image = images[row['name']]
        axes.imshow(
            image.numpy(), cmap='Blues', vmin=0, vmax=1, aspect='auto', interpolation='nearest'
        )
        axes.set_title(f'{wrapped(row["name"])}\n{tuple(row["shape"])}', fontsize=6.5)
        axes.tick_params(labelsize=6)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel(f'{unit}input channels', fontsize=9)
    figure.supylabel(f'{unit}output channels', fontsize=9)
    title = 'Kept blocks of the largest layers (dark: all kernel positions)'
    figure.suptitle(title if unit else 'Kept channels of the largest layers', fontsize=10)


def _images(masks: BlockMasks) -> dict[str, Tensor]:
    """Share kept at every place of every layer's map, by name."""
    plan, kept = masks.plan, masks.hard_mask().cpu()
    if not isinstance(plan, ChannelPlan):
        parts = kept.split(plan.layer_sizes)
        return {layer.name: layer.map_of(part) for layer, part in zip(plan.layers, parts)}
    images = {}
    for layer in plan.channels:
        (_, gone), *_ = pruned_weights(layer, kept)
        stays = (~gone).float().cpu()
        if stays.ndim > 1:
            images[layer.name] = stays.reshape(*stays.shape[:2], -1).amax(-1)
    return images


def wrapped(name: str, width: int = 30) -> str:
    """Break a module's name at its dots into lines that fit above a map."""
    lines = ['']
    for part in name.split('.'):
        joined = f'{lines[-1]}.{part}' if lines[-1] else part
        if len(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(f'.{part}')
    return '\n'.join(lines)
