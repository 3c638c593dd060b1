"""Draw the pictures of docs/method.md, by the code that they explain: `python docs/pictures.py`.

hardening.png   one soft mask as the temperature falls: always on budget, in the end hard
escape.png      a point that is stationary but not sparse, and how a falling temperature leaves it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsmart.functional import TemperatureSchedule, hard_topk, soft_topk

IMAGES = Path(__file__).parent / 'images'
BLOCKS, KEPT = 40, 10
START, END = 1.0, 0.01  # the defaults of `smart.temperature`
STEPS = 600

# A least-squares problem of eight weights, three of which may stay.
SAMPLES, WEIGHTS, STAY, STEPS = 20, 8, 3, 300


def hardening(points: int = 241) -> tuple[Tensor, Tensor]:
    """Temperatures of a search, `(points,)`, and the mask at each, `(points, BLOCKS)`.

    Blocks of equal cost are in the order of their importance, a standard normal variable.
    """
    middles = (torch.arange(BLOCKS, dtype=torch.float64) + 0.5) / BLOCKS
    importance = torch.special.ndtri(middles)
    schedule = TemperatureSchedule(START, END)
    temperatures = [schedule(step / (points - 1)) for step in range(points)]
    masks = [soft_topk(importance, float(KEPT), temperature) for temperature in temperatures]
    return torch.tensor(temperatures), torch.stack(masks)


class Descent(NamedTuple):
    """What gradient descent in w and m comes to."""

    masks: Tensor  # f at every step, (STEPS, WEIGHTS)
    loss: float  # L(w ⊙ f) at the end
    hardened: float  # L(w ⊙ h) at the end, h the hard mask


def descent(end: float) -> Descent:
    """Descend from a stationary point that is not sparse, τ falling from 1 to `end`.

    The point: w = u / f(m), u being the dense optimum. So w ⊙ f is that optimum, where ∂L/∂(w ⊙ f)
    is 0, and all that reaches w and m is a multiple of it.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, WEIGHTS, generator=generator).double()
    truth = torch.randn(WEIGHTS, generator=generator).double()
    outputs = inputs @ truth + 0.5 * torch.randn(SAMPLES, generator=generator).double()
    optimum = torch.linalg.lstsq(inputs, outputs.unsqueeze(1)).solution.squeeze(1)

    def loss(weights: Tensor) -> Tensor:
        return 0.5 * (inputs @ weights - outputs).square().sum()

    importance = (0.5 * torch.randn(WEIGHTS, generator=generator).double()).requires_grad_()
    schedule = TemperatureSchedule(1.0, end)
    weights = (optimum / soft_topk(importance, STAY, 1.0).detach()).requires_grad_()
    optimizer = torch.optim.SGD([weights, importance], lr=0.001)
    masks = []
    for step in range(STEPS):
        mask = soft_topk(importance, STAY, schedule(step / (STEPS - 1)))
        masks.append(mask.detach())
        optimizer.zero_grad()
        loss(weights * mask).backward()
        optimizer.step()
    with torch.no_grad():
        hardened = loss(weights * hard_topk(importance, STAY))
        return Descent(torch.stack(masks), loss(weights * mask).item(), hardened.item())


def draw_hardening() -> Any:
    temperatures, masks = hardening()
    figure, (curves, history) = _figure((10, 3.6), [1, 1.1])
    shown = [1.0, 0.3, 0.1, 0.03, 0.01]
    for number, temperature in enumerate(shown):
        nearest = int((temperatures - temperature).abs().argmin())
        label = f'τ = {temperature:g}'
        colour = _colours(1 - 0.85 * number / (len(shown) - 1))
        curves.plot(
            range(1, BLOCKS + 1), masks[nearest].numpy(), '.-', ms=4, color=colour, label=label
        )
    curves.set(xlabel='block, by importance', ylabel='mask', title='Every curve sums to the budget')
    curves.legend()
    image = history.imshow(
        masks.T.numpy(), origin='lower', aspect='auto', cmap='viridis', vmin=0, vmax=1,
        extent=(0, 1, 0.5, BLOCKS + 0.5), interpolation='nearest',
    )  # fmt: skip
    history.axhline(BLOCKS - KEPT + 0.5, color='white', lw=0.8, ls=':')
    history.set(
        xlabel=f'progress of the search, τ from {START:g} to {END:g}',
        ylabel='block, by importance',
        title='The same over a search',
    )
    figure.colorbar(image, ax=history, label='mask')
    return figure


def draw_escape() -> Any:
    figure, panels = _figure((10, 3.6), [1, 1])
    for axes, end, what in zip(panels, (1.0, END), ('τ stays 1', 'τ falls')):
        run = descent(end)
        for number, curve in enumerate(run.masks.T):
            axes.plot(curve.numpy(), color=_colours(0.9 * number / (WEIGHTS - 1)))
        axes.set(
            xlabel='step of gradient descent',
            ylabel='mask of each of eight weights',
            ylim=(-0.04, 1.04),
            title=f'{what}: loss {run.loss:.0f}, after hardening {run.hardened:.0f}',
        )
    return figure


def _figure(size: tuple[float, float], widths: list[float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout='constrained')
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, 2, width_ratios=widths)


def _colours(place: float) -> Any:
    from matplotlib import colormaps

    return colormaps['viridis'](place)


def main(folder: Path = IMAGES) -> None:
    for name, draw in (('hardening', draw_hardening), ('escape', draw_escape)):
        draw().savefig(folder / f'{name}.png', dpi=110, metadata={'Software': None})


if __name__ == '__main__':
    main()
