"""What the finished runs of a suite amount to: a row a run, means, and who is above whom."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mmsmart.compare.folder import CHANGED, DONE, FAILED, JobFolder
from mmsmart.compare.grid import Job
from mmsmart.export import complete_or_absent
from mmsmart.pruning_json import read_report


@dataclass(frozen=True)
class Result:
    """A finished pruning run, a row of `results.csv`.

    `dense` is the metric of the weights that the search began with; `params_kept` and `macs_kept`
    are shares of the whole network's; `seconds` is None for a run that was killed in between.
    """

    task: str
    method: str
    block: str
    sparsity: float
    seed: int
    metric: str
    value: float
    dense: float | None
    achieved_sparsity: float
    params_kept: float
    macs_kept: float
    seconds: float | None


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, their standard deviation (None for one seed), and how many they are."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean | None:
        """None for no values; the deviation is that of a sample, over n - 1.

        Example:
            >>> Mean.of([1.0, 2.0, 3.0])
            Mean(mean=2.0, deviation=1.0, count=3)
        """
        values = list(values)
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Duel:
    """The first method against the best of its rivals in a cell, over the seeds that all share.

    `missing` names the methods without a result; then nothing is compared.
    """

    task: str
    block: str
    sparsity: float
    first: Mean | None = None
    rival: str = ''
    best: Mean | None = None
    margin: Mean | None = None
    missing: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether every method has a result for a seed that they share."""
        return self.margin is not None

    @property
    def is_won(self) -> bool:
        """Whether the first method is above every other; a tie is not."""
        return self.margin is not None and round(self.margin.mean, 9) > 0


def result_of(root: str | Path, job: Job) -> Result:
    """The result of a finished pruning run.

    Raises:
        ValueError: If its `pruning.json` is damaged, or does not hold the metric.
    """
    folder = JobFolder(root, job)
    try:
        report = read_report(folder.path / 'pruning.json')
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    dense, pruned = report['dense'], report['pruned']
    value = pruned.get(job.metric)
    if value is None or not math.isfinite(value):
        there = [key for key in pruned if key not in ('params', 'macs')]
        raise ValueError(
            f'tasks.{job.task}.metric: {job.metric!r} is {value} in pruning.json, which has '
            f'{there}.'
        )
    return Result(
        task=job.task,
        method=job.method,
        block=job.block,
        sparsity=job.sparsity,
        seed=job.seed,
        metric=job.metric,
        value=_rounded(value),
        dense=_rounded(dense.get(job.metric)),
        achieved_sparsity=round(report['achieved_sparsity'], 6),
        params_kept=round(pruned['params'] / dense['params'], 6),
        macs_kept=round(pruned['macs'] / dense['macs'], 6) if dense['macs'] else 1.0,
        seconds=folder.record().get('seconds'),
    )


def _rounded(value: float | None) -> float | None:
    """To six digits: metrics come in float32, whose noise beyond them would break ties."""
    return None if value is None else float(f'{value:.6g}')


def expect_result(root: str | Path, job: Job) -> None:
    """Raise as :func:`result_of` if a finished run can't be used; dense runs have no result."""
    if job.method is not None:
        result_of(root, job)


def collect(root: str | Path, jobs: Sequence[Job]) -> tuple[list[Result], dict[str, str]]:
    """Results of the pruning runs that are finished, and of all others by name why there is none.

    A dense run is named only if it failed.
    """
    results, missing = [], {}
    for job in jobs:
        folder = JobFolder(root, job)
        state, record = folder.state(), folder.record()
        if state == FAILED:
            last = record.get('log') or ['']
            missing[job.name] = ': '.join(filter(None, [record.get('reason', FAILED), last[-1]]))
        elif job.method is None:
            continue
        elif state == DONE:
            try:
                results.append(result_of(root, job))
            except ValueError as error:
                missing[job.name] = str(error)
        else:
            missing[job.name] = 'run with other settings' if state == CHANGED else 'not run yet'
    return results, missing


def save_csv(results: Sequence[Result], path: str | Path) -> None:
    """Write `results.csv`, a row a run in the order of the suite."""
    with complete_or_absent(path) as temporary, temporary.open('w', newline='') as file:
        names = [item.name for item in fields(Result)]
        writer = csv.DictWriter(file, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def mean_of(
    results: Iterable[Result], method: str, sparsity: float, seeds: Iterable[int] | None = None
) -> Mean | None:
    """Mean of a method's results at a sparsity, over these seeds or all."""
    values = {r.seed: r.value for r in results if (r.method, r.sparsity) == (method, sparsity)}
    return Mean.of(values[seed] for seed in (values if seeds is None else seeds))


def dense_mean(results: Iterable[Result]) -> Mean | None:
    """Mean over seeds of the dense metric; of several runs of a seed the mean counts once."""
    seeds: dict[int, list[float]] = {}
    for result in results:
        if result.dense is not None:
            seeds.setdefault(result.seed, []).append(result.dense)
    return Mean.of(statistics.fmean(values) for values in seeds.values())


def duels(
    results: Sequence[Result], cells: Iterable[tuple[str, str, float]], methods: Sequence[str]
) -> list[Duel]:
    """The first method against its best rival, in each of these cells (task, block, sparsity)."""
    return [_duel(results, cell, methods) for cell in cells]


def _duel(results: Sequence[Result], cell: tuple[str, str, float], methods: Sequence[str]) -> Duel:
    values: dict[str, dict[int, float]] = {method: {} for method in methods}
    for result in results:
        if (result.task, result.block, result.sparsity) == cell and result.method in values:
            values[result.method][result.seed] = result.value
    seeds = sorted(set.intersection(*(set(found) for found in values.values())))
    if not seeds:
        return Duel(*cell, missing=tuple(method for method in methods if not values[method]))
    first, *rivals = methods
    means = {method: Mean.of(values[method][seed] for seed in seeds) for method in methods}
    rival = max(rivals, key=lambda method: means[method].mean)
    margin = Mean.of(values[first][seed] - values[rival][seed] for seed in seeds)
    return Duel(*cell, means[first], rival, means[rival], margin)
