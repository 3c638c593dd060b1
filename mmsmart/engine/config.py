"""The `smart` part of a config: its keys, defaults and checks.

Everything here is checked without a model and before anything is written.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mmsmart.budget import RESOURCES, Target, expect_fixed, read_targets
from mmsmart.functional import TemperatureSchedule
from mmsmart.latency import LatencyTable, read_table
from mmsmart.layer_rules import NOfM, checked_rules, default_sparsity, read_block
from mmsmart.methods import METHODS, Method

INITIALISATIONS = ('magnitude', 'activation', 'gradient', 'random', 'zero')


def build(cls: type, key: str, values: dict[str, Any] | None) -> Any:
    """Make a settings object from a part of the config.

    Raises:
        ValueError: For what is no dict, or a key that it does not have, naming the nearest one.
    """
    allowed = [item.name for item in fields(cls) if item.init]
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f'{key}: expected a dict with keys of {allowed}, got {values!r}.')
    for name in values:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f' Did you mean {near[0]!r}?' if near else ''
            raise ValueError(f'{key}: unknown key {name!r}; allowed are {allowed}.{hint}')
    return cls(**values)


def make_method(name: str, settings: dict[str, Any] | None = None) -> Method:
    """The method that `smart.method` names, with the settings of `smart.method_cfg`.

    Raises:
        ValueError: If there is no such method, or it has no such setting.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'smart.method: got {name!r}, allowed are {tuple(METHODS)}.{hint}')
    return build(METHODS[name], 'smart.method_cfg', settings)


@dataclass(frozen=True)
class Stages:
    """Shares of the run's iterations: train dense, search the structure, fine-tune what is kept."""

    pretrain: float = 0.0
    search: float = 0.6
    finetune: float = 0.4

    def __post_init__(self) -> None:
        shares = (self.pretrain, self.search, self.finetune)
        if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in shares):
            raise ValueError(f'smart.stages: expected three numbers, got {self}.')
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f'smart.stages: the shares must lie in [0, 1] and add up to 1, got {self} with sum '
                f'{sum(shares):g}.'
            )
        if self.search == 0:
            raise ValueError('smart.stages: search is 0, so no structure would be found. Raise it.')

    def boundaries(self, max_iters: int) -> tuple[int, int]:
        """First iteration of the search and of the fine-tuning.

        Raises:
            ValueError: If the run is so short that the search has no iteration.

        Example:
            >>> Stages(0.1, 0.5, 0.4).boundaries(1000)
            (100, 600)
        """
        begin = round(self.pretrain * max_iters)
        end = round((self.pretrain + self.search) * max_iters)
        if end <= begin:
            raise ValueError(
                f'smart.stages: a search share of {self.search:g} of {max_iters} iterations is '
                'less than one iteration. Train longer, or raise smart.stages.search.'
            )
        return begin, end


@dataclass(frozen=True)
class ImportanceStart:
    """Where the importance starts, and what it follows besides its optimiser."""

    init: str = 'magnitude'
    scale: float = 0.1
    batches: int = 16
    curvature: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise ValueError(f'smart.importance.scale: expected a number, got {self.scale!r}.')
        if not 0 < self.scale < math.inf:
            raise ValueError(
                f'smart.importance.scale: got {self.scale!r}, expected a number above 0, the '
                "standard deviation of the first importance (init='zero' has none)."
            )
        if self.init not in INITIALISATIONS:
            raise ValueError(
                f'smart.importance.init: got {self.init!r}, allowed are {INITIALISATIONS}.'
            )
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise ValueError(
                f'smart.importance.batches: expected an integer above 0, got {self.batches!r}.'
            )
        held = isinstance(self.curvature, (int, float)) and not isinstance(self.curvature, bool)
        if not (held and 0 <= self.curvature < math.inf):
            raise ValueError(
                f'smart.importance.curvature: got {self.curvature!r}, expected a number of at '
                'least 0; 0 leaves the importance to its optimiser alone.'
            )


@dataclass(frozen=True)
class ImportanceOptimizer:
    """How the importance learns; `optimizer` is an MMEngine optimiser config without `lr`."""

    lr: float = 0.01
    optimizer: dict[str, Any] = field(default_factory=lambda: dict(type='Adam'))

    def __post_init__(self) -> None:
        if isinstance(self.lr, bool) or not isinstance(self.lr, (int, float)) or not self.lr > 0:
            raise ValueError(f'smart.importance.lr: expected a number above 0, got {self.lr!r}.')
        if not isinstance(self.optimizer, dict) or 'type' not in self.optimizer:
            raise ValueError(
                "smart.importance.optimizer: expected a dict such as dict(type='Adam'), got "
                f'{self.optimizer!r}.'
            )
        if self.optimizer.get('weight_decay', 0) or 'lr' in self.optimizer:
            raise ValueError(
                'smart.importance.optimizer: `lr` belongs to smart.importance.lr, and the '
                'importance takes no weight decay (the budget alone decides what is kept).'
            )


@dataclass(frozen=True)
class Importance:
    """`smart.importance`: start and optimiser in one dict."""

    init: str = ImportanceStart.init
    scale: float = ImportanceStart.scale
    batches: int = ImportanceStart.batches
    curvature: float = ImportanceStart.curvature
    lr: float = ImportanceOptimizer.lr
    optimizer: dict[str, Any] = field(default_factory=lambda: dict(type='Adam'))


@dataclass(frozen=True)
class Temperature:
    """`smart.temperature`: τ falls from start to end over the search."""

    start: float = 1.0
    end: float = 0.01
    shape: str = 'geometric'

    def schedule(self) -> TemperatureSchedule:
        try:
            return TemperatureSchedule(self.start, self.end, self.shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f'smart.temperature: {error}') from error


def checked_recalibrate(batches: int) -> int:
    """`smart.recalibrate`, a number of batches.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise ValueError(
            f'smart.recalibrate: expected a number of batches, 0 or more, got {batches!r}.'
        )
    return batches


@dataclass(frozen=True)
class MaxDrop:
    """`smart.max_drop`: how far the metric may drop, and what may be spent on finding out.

    `trials` short runs at most, each of `share` of the run's length, at sparsities between `low`
    and `high`.
    """

    drop: float | None = None
    metric: str | None = None
    trials: int = 6
    share: float = 0.25
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        numbers = dict(drop=self.drop, share=self.share, low=self.low, high=self.high)
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(
                    f'smart.max_drop.{key}: expected a number of at least 0, got {value!r}.'
                )
        if isinstance(self.trials, bool) or not isinstance(self.trials, int) or self.trials < 1:
            raise ValueError(
                f'smart.max_drop.trials: expected an integer above 0, got {self.trials!r}.'
            )
        if not 0 < self.share <= 1:
            raise ValueError(f'smart.max_drop.share: {self.share!r} is outside (0, 1].')
        if not self.low < self.high <= 1:
            raise ValueError(
                f'smart.max_drop: expected 0 <= low < high <= 1, got low={self.low!r} and '
                f'high={self.high!r}.'
            )


@dataclass(frozen=True)
class Smart:
    """The whole `smart` dict of a config."""

    sparsity: float | dict[str, Any] | None = None
    max_drop: float | dict[str, Any] | None = None
    block: Sequence[int] | str = (16, 8, 1, 1)
    round_to: int = 1
    resource: str = 'params'
    latency: str | dict[str, Any] | None = None
    method: str = 'smart'
    method_cfg: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    temperature: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, Any] = field(default_factory=dict)
    layers: Sequence[dict[str, Any]] = ()
    distillation: float | dict[str, Any] | None = None
    recalibrate: int = 0

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise ValueError(f'smart.resource: got {self.resource!r}, allowed are {RESOURCES}.')
        asked = {target.resource for target in self.targets()}
        if 'latency' in asked and self.latency is None:
            raise ValueError(
                "smart.latency: a budget of latency needs a table of your hardware's latencies: "
                'the path of a YAML or JSON file, or a dict. See docs/configuration.md.'
            )
        self.latency_table()
        make_method(self.method, self.method_cfg)
        rules = checked_rules(self.layers, coupled=self.block == 'channel')
        if self.block != 'channel':
            block = read_block('smart.block', self.block)
            if isinstance(block, NOfM) and not any('block' in rule for rule in rules):
                whole = [target for target in self.targets() if not target.part]
                expect_fixed(whole, block.n, block.m)
        if self.round_to != 1 and self.block != 'channel':
            raise ValueError(
                f'smart.round_to: {self.round_to!r} rounds counts of channels, and needs '
                "smart.block='channel'."
            )
        if self.drop() is not None and self.sparsity is not None:
            raise ValueError(
                f'smart.max_drop: {self.max_drop!r} finds the sparsity, and smart.sparsity says '
                f'{self.sparsity!r}. Leave one of them out.'
            )
        if self.max_drop is not None and isinstance(self.block, str) and ':' in self.block:
            raise ValueError(
                f'smart.max_drop: the block {self.block!r} fixes the sparsity, so none is found.'
            )

    def drop(self) -> MaxDrop | None:
        """The settings of `max_drop`, if there are any."""
        if self.max_drop is None:
            return None
        written = self.max_drop
        return build(
            MaxDrop, 'smart.max_drop', written if isinstance(written, dict) else {'drop': written}
        )

    def model_args(self) -> dict[str, Any]:
        """Arguments of `mmsmart.SmartModel`."""
        return dict(
            sparsity=self.removed(),
            block=self.block,
            layers=self.layers,
            resource=self.resource,
            latency=self.latency_table(),
            round_to=self.round_to,
        )

    def removed(self) -> float | dict[str, Any]:
        """`sparsity`, or what stands for it."""
        if self.sparsity is None:
            return default_sparsity(self.block, 'smart.block')
        return self.sparsity

    def targets(self) -> list[Target]:
        """What to remove, by part and resource."""
        return read_targets(self.removed(), self.resource)

    def latency_table(self) -> LatencyTable | None:
        """The table of `latency`."""
        return None if self.latency is None else read_table(self.latency)

    def optimizer_args(self) -> dict[str, Any]:
        """Arguments of `mmsmart.SmartOptimWrapper`."""
        importance = build(Importance, 'smart.importance', self.importance)
        checked = ImportanceOptimizer(importance.lr, importance.optimizer)
        return dict(importance=dict(lr=checked.lr, optimizer=checked.optimizer))

    def hook_args(self) -> dict[str, Any]:
        """Arguments of `mmsmart.SmartPruningHook`."""
        importance = build(Importance, 'smart.importance', self.importance)
        return dict(
            method=self.method,
            method_cfg=self.method_cfg,
            stages=self.stages,
            temperature=self.temperature,
            importance={x.name: getattr(importance, x.name) for x in fields(ImportanceStart)},
            distillation=self.distillation,
            recalibrate=self.recalibrate,
        )
