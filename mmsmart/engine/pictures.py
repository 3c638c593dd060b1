"""Pictures of the masks while they are searched, for every visualisation backend of MMEngine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.runner import Runner
from torch import Tensor

from mmsmart.channels import ChannelLayer
from mmsmart.engine.run_log.starts import in_network_order
from mmsmart.html_report.run import Layer
from mmsmart.masking import BlockMasks
from mmsmart.plans import ChannelPlan
from mmsmart.shrink import is_grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmsmart.html_report.theme import Theme

NAME = 'masks'
_MAPS = 6


@master_only
def show_masks(runner: Runner, masks: BlockMasks) -> None:
    """Give the run's visualiser a picture of the masks as they are now, called 'masks'.

    On the left the kept share of every layer, on the right the block maps of the largest ones.
    TensorBoard and its like show it at every step, the local backend writes it as PNG.
    """
    layers = in_network_order(layers_now(masks), runner)
    image = draw_now(layers, runner.iter, masks.temperature)
    runner.visualizer.add_image(NAME, image, step=runner.iter)


def layers_now(masks: BlockMasks) -> list[Layer]:
    """The pruned layers under the present mask, soft or hard, with their block maps."""
    values = masks.mask().cpu()
    if isinstance(masks.plan, ChannelPlan):
        with_rest = torch.cat([values, torch.ones(1)])  # -1, the last: a channel that stays
        return [
            _layer(layer.name, layer.module.weight, _crossed(layer, with_rest))
            for layer in masks.plan.channels
            if layer.in_ is not None
        ]
    parts = values.split([layer.num_blocks for layer in masks.layers])
    return [
        _layer(
            layer.name, layer.weight, layer.map_of(part), float((layer.sizes().cpu() * part).sum())
        )
        for layer, part in zip(masks.layers, parts)
    ]


def _crossed(layer: ChannelLayer, values: Tensor) -> Tensor:
    out = values[layer.out.cpu()][:, None]
    return out if is_grouped(layer.module) else out * values[layer.in_.cpu()]


def _layer(name: str, weight: Tensor, image: Tensor, kept: float | None = None) -> Layer:
    total = weight.numel()
    kept = total * float(image.mean()) if kept is None else kept
    return Layer(name, tuple(weight.shape), total, kept, image=image.numpy())


def draw_now(layers: list[Layer], iteration: int, temperature: float | None) -> np.ndarray:
    """The picture, uint8 `(height, width, 3)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from mmsmart.html_report.theme import LIGHT

    with LIGHT.applied():
        canvas = FigureCanvasAgg(_draw(LIGHT, layers, iteration, temperature))
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw(theme: Theme, layers: list[Layer], iteration: int, temperature: float | None) -> Figure:
    from matplotlib.figure import Figure

    from mmsmart.html_report.figures import draw_map

    largest = sorted(layers, key=lambda layer: -layer.params_total)[:_MAPS]
    chosen = [layer for layer in layers if layer in largest]
    height = max(4.8, 0.17 * len(layers) + 1)
    figure = Figure(figsize=(12, height))  # placed by hand: a layout engine takes its time
    names = min(0.25, 0.0055 * max(len(layer.name) for layer in layers))
    ends = dict(bottom=0.35 / height, top=1 - 0.75 / height)
    axes = figure.add_gridspec(left=0.01 + names, right=0.4, **ends).subplots()
    rows = range(len(layers))
    axes.barh(rows, [1] * len(layers), color=theme.empty)
    axes.barh(rows, [layer.density for layer in layers], color=theme.kept)
    axes.set_yticks(rows, [layer.name for layer in layers], fontsize=7)
    axes.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5), title='share kept')
    lines = -(-len(chosen) // 3)
    space = dict(hspace=min(0.6, 0.8 / (height / lines - 0.8)), wspace=0.14)
    cells = figure.add_gridspec(lines, 3, left=0.435, right=0.99, **ends, **space)
    grid = cells.subplots(squeeze=False)
    for place in grid.flat[len(chosen) :]:
        place.axis('off')
    for place, layer in zip(grid.flat, chosen):
        draw_map(theme, place, layer)
    state = 'hard masks' if temperature is None else f'soft masks at τ = {temperature:.3g}'
    figure.text(
        0.01, 1 - 0.1 / height, f'iteration {iteration:,}: {state}', va='top', weight='bold'
    )
    return figure
