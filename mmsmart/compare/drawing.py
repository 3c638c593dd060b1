"""Curves of a comparison: the metric against the sparsity, a line a method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from mmsmart.compare.results import Result, dense_mean, mean_of
from mmsmart.compare.suite import block_title
from mmsmart.export import complete_or_absent

_MARKERS = 'oosD^vP<>X*ph'  # those of colours that come back differ


def draw_curves(results: Sequence[Result], methods: Sequence[str], path: str | Path) -> None:
    """Draw the results of one task and block: means, bars of one standard deviation, dense dashed.

    The first method is drawn in black over the others; beside it the bars stand apart so that none
    hides another.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError('results: there is none to draw.')
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sparsities = sorted({result.sparsity for result in results})
    gap = min((b - a for a, b in pairwise(sparsities)), default=0.1)
    shown = [method for method in methods if any(r.method == method for r in results)]
    colours = colormaps['tab20'].colors
    for index, method in enumerate(shown):
        means = {s: mean_of(results, method, s) for s in sparsities}
        there = {s: mean for s, mean in means.items() if mean is not None}
        is_first = method == methods[0]
        aside = gap * 0.25 * ((index + 0.5) / len(shown) - 0.5)
        axes.errorbar(
            [s + aside for s in there],
            [mean.mean for mean in there.values()],
            [mean.deviation or 0.0 for mean in there.values()],
            # Of tab20 the strong ones first, then the pale ones.
            color='black' if is_first else colours[(2 * index + index // 10) % 20],
            marker=_MARKERS[index % len(_MARKERS)], markersize=6 if is_first else 5,
            linewidth=2.4 if is_first else 1.3, elinewidth=1, capsize=2.5,
            zorder=3 if is_first else 2, label=method,
        )  # fmt: skip
    dense = dense_mean(results)
    if dense is not None:
        axes.axhline(dense.mean, color='0.4', linestyle='--', linewidth=1.2, label='dense')
    first = results[0]
    seeds = len({result.seed for result in results})
    axes.set_xticks(sparsities, [f'{sparsity:g}' for sparsity in sparsities])
    # Half a step on either side: what stands aside of a lone sparsity must not look like another.
    axes.set_xlim(sparsities[0] - gap / 2, sparsities[-1] + gap / 2)
    axes.set(
        xlabel='sparsity',
        ylabel=first.metric,
        title=f'{first.task}, {block_title(first.block)}, '
        + ('one seed' if seeds == 1 else f'mean and standard deviation of up to {seeds} seeds'),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=120)
