"""A run in plain data: all that a report shows, and what of it is not there yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STAGES = ('pretrain', 'search', 'finetune')
TITLES = {'pretrain': 'dense', 'search': 'search', 'finetune': 'fine-tune'}
_FAVOURITES = ('accuracy/top1', 'coco/segm_mAP', 'coco/bbox_mAP', 'pascal_voc/mAP', 'mIoU')


@dataclass(frozen=True)
class Timeline:
    """First iteration of the search and of the fine-tuning, and the run's length.

    Example:
        >>> Timeline(100, 600, 1000).stage(99), Timeline(100, 600, 1000).stage(600)
        ('pretrain', 'finetune')
    """

    search: int
    finetune: int
    end: int

    def spans(self) -> list[tuple[str, int, int]]:
        """Stages that have an iteration: name, first iteration, end."""
        ends = (0, self.search, self.finetune, self.end)
        spans = zip(STAGES, ends, ends[1:])
        return [(name, begin, end) for name, begin, end in spans if end > begin]

    def stage(self, iteration: int) -> str:
        """The stage that this iteration, counted from 0, belongs to."""
        return STAGES[(iteration >= self.search) + (iteration >= self.finetune)]


@dataclass(frozen=True)
class Start:
    """One start of the training: the first, or a resumption.

    Args:
        when: Date and time.
        iteration: Iterations done before it.
        command: As it was typed; None if it was not recorded.
        versions: Versions by package.
    """

    when: str
    iteration: int = 0
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One pruned layer: what it costs, and what is left of it.

    Args:
        name: Name of the module.
        shape: Shape of its weight.
        params_total: Its weights (with 'channel' its parameters), dense.
        params_kept: Those that are left; during the search the sum of the soft mask. None if there
            is no mask yet.
        macs_total: Its MACs for one image, dense; None if they were not counted yet.
        macs_kept: Those that are left.
        image: Share kept at every place of its block map, `(output blocks, input blocks)`, in
            [0, 1].
        at_floor: Whether a floor of its own kept it from losing more.
    """

    name: str
    shape: tuple[int, ...]
    params_total: int
    params_kept: float | None = None
    macs_total: int | None = None
    macs_kept: float | None = None
    image: np.ndarray | None = None
    at_floor: bool = False

    @property
    def density(self) -> float | None:
        """Share of its parameters that is kept."""
        return None if self.params_kept is None else self.params_kept / max(self.params_total, 1)


@dataclass(frozen=True)
class Importances:
    """Where the blocks stand around the threshold.

    Args:
        distance: Importance minus threshold, `(num_blocks,)`.
        kept: Blocks on the kept side, bool `(num_blocks,)`.
        temperature: τ of the soft mask; None once the mask is hard.
    """

    distance: np.ndarray
    kept: np.ndarray
    temperature: float | None = None


@dataclass
class Run:
    """What is known of a run.

    Args:
        name: What it is called in the report.
        folder: Its `work_dir`.
        finished: Whether it wrote `pruning.json`.
        iteration: Iterations done.
        timeline: Where its stages begin; None if that can't be told.
        starts: Its starts, the first one first.
        train: Rows of the log, each with `iter`, and `loss`, `temperature`, `undecided`, `moved`.
        validation: Iteration and metrics of every validation.
        method: 'smart' or a baseline's name.
        budgets: Rows of `pruning.json`'s `budgets`; `kept` is None while the mask is soft.
        dense: `params`, `macs` and metrics before pruning.
        pruned: The same after.
        layers: The pruned layers in the network's order.
        masks_from: The file that the masks were read from.
        importances: None if no checkpoint holds them.
        excluded: Name and reason of every weight that stays dense; None if not known yet.
        config: Its config, as text.
        missing: What is not there, by section, in a sentence.
    """

    name: str
    folder: str
    finished: bool = False
    iteration: int = 0
    timeline: Timeline | None = None
    starts: list[Start] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    method: str = 'smart'
    budgets: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    masks_from: str = ''
    importances: Importances | None = None
    excluded: list[tuple[str, str]] | None = None
    config: str = ''
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """What it is doing: 'finished', or the stage of its next iteration."""
        if self.finished:
            return 'finished'
        return self.timeline.stage(self.iteration) if self.timeline else 'pretrain'

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a scalar of the training log, where it was logged."""
        rows = [row for row in self.train if isinstance(row.get(key), (int, float))]
        return [row['iter'] for row in rows], [row[key] for row in rows]

    def scores(self, metric: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a metric, where it was validated."""
        found = [(i, row[metric]) for i, row in self.validation if metric in row]
        return [i for i, _ in found], [value for _, value in found]


def main_metric(runs: Sequence[Run]) -> str | None:
    """The metric that the pictures show: the usual one of the task, else the first."""
    names = list(dict.fromkeys(key for run in runs for _, row in run.validation for key in row))
    names += [key for run in runs for key in run.pruned if key not in ('params', 'macs', 'latency')]
    return next((name for name in _FAVOURITES if name in names), names[0] if names else None)


def short(value: float) -> str:
    """A count in at most four characters and a letter.

    Example:
        >>> short(950), short(1_250_000), short(3.2e9)
        ('950', '1.25M', '3.2G')
    """
    for letter, unit in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(value) >= unit:
            return f'{value / unit:.3g}{letter}'
    return f'{value:.3g}'
