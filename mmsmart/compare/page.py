"""The results of a suite as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmsmart.compare.grid import Job
from mmsmart.compare.results import Duel, Mean, Result, dense_mean, duels, mean_of
from mmsmart.compare.suite import Suite, block_name, block_title, slug

NOTHING = '–'


def picture_name(task: str, block: str) -> str:
    """File of the curves of a task and block.

    Example:
        >>> picture_name('resnet14', '8x8')
        'resnet14-8x8.png'
    """
    return f'{slug(task)}-{slug(block)}.png'


def markdown(
    suite: Suite,
    jobs: Sequence[Job],
    results: Sequence[Result],
    missing: dict[str, str],
    pictures: Path | None = None,
) -> str:
    """The page: a table for each task and block, who is above whom, and what is missing.

    Args:
        suite: What was compared.
        jobs: Its runs.
        results: Those that are finished.
        missing: Of the others, why there is none.
        pictures: Folder in which the curves are looked for.
    """
    planned = sum(job.method is not None for job in jobs)
    methods = list(suite.methods)
    lines = [
        f'# {suite.name}',
        '',
        f'{len(results)} of {planned} runs are finished. Cells are the mean over seeds ± the '
        f"sample's standard deviation (number of seeds); {NOTHING} stands where no run is "
        'finished. **Bold** is the highest mean of a column among the methods with the most seeds '
        'there.',
        '',
    ]
    cells = []
    for name, task in suite.tasks.items():
        for block in map(block_name, task.blocks):
            mine = [result for result in results if (result.task, result.block) == (name, block)]
            cells += [(name, block, sparsity) for sparsity in task.sparsities]
            title = f'## {name}, {block_title(block)}'
            lines += [title, '', *_table(mine, methods, task.sparsities)]
            picture = picture_name(name, block)
            if mine and pictures is not None and (pictures / picture).is_file():
                lines += ['', f'![{name}, {block}]({picture})']
            dense = dense_mean(mine)
            lines += ['', f'{task.metric}; dense {_shown(dense, _decimals(mine))}.', '']
    if len(methods) > 1:
        lines += [*_wins(duels(results, cells, methods), methods[0]), '']
    lines += _gaps(missing)
    return '\n'.join(lines).rstrip() + '\n'


def _table(
    results: Sequence[Result], methods: Sequence[str], sparsities: Sequence[float]
) -> Iterator[str]:
    decimals = _decimals(results)
    columns = {
        sparsity: {method: mean_of(results, method, sparsity) for method in methods}
        for sparsity in sparsities
    }
    best = {sparsity: _best(column.values()) for sparsity, column in columns.items()}
    yield f'| method | {" | ".join(f"{sparsity:g}" for sparsity in sparsities)} |'
    yield f'|---|{"---|" * len(sparsities)}'
    for method in methods:
        row = []
        for sparsity, column in columns.items():
            mean = column[method]
            text = _shown(mean, decimals)
            is_best = mean is not None and (mean.count, mean.mean) == best[sparsity]
            row.append(f'**{text}**' if is_best else text)
        yield f'| {method} | {" | ".join(row)} |'


def _best(means: Iterable[Mean | None]) -> tuple[int, float] | None:
    return max(((mean.count, mean.mean) for mean in means if mean is not None), default=None)


def _wins(duels: Sequence[Duel], first: str) -> list[str]:
    counted = [duel for duel in duels if duel.counts]
    won = sum(duel.is_won for duel in counted)
    lines = [
        f'## Where {first} is above every other',
        '',
        f'In **{won} of {len(counted)}** cells in which every method has a result, over the seeds '
        'that all of them share; ties are not counted as above. '
        f'{len(duels) - len(counted)} of {len(duels)} cells are not counted because a result is '
        'missing. The margin is over the best rival of the cell, ± the standard deviation of its '
        'differences, seed by seed.',
        '',
        f'| task | block | sparsity | {first} | best rival | | margin | above |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for duel in duels:
        cell = f'| {duel.task} | {duel.block} | {duel.sparsity:g} |'
        if not duel.counts:
            absent = ', '.join(duel.missing) or 'a seed that all share'
            lines.append(f'{cell} | | | | missing: {absent} |')
            continue
        decimals = _places([duel.first.mean, duel.best.mean])
        above = 'yes' if duel.is_won else 'tie' if round(duel.margin.mean, 9) == 0 else 'no'
        lines.append(
            f'{cell} {_shown(duel.first, decimals)} | {duel.rival} | {_shown(duel.best, decimals)} '
            f'| {_shown(duel.margin, decimals, "+")} | {above} |'
        )
    return lines


def _gaps(missing: dict[str, str]) -> list[str]:
    unrun = sum(reason == 'not run yet' for reason in missing.values())
    lines = ['## Missing', '', f'{unrun} runs were not made yet.', ''] if missing else []
    others = {name: why for name, why in missing.items() if why != 'not run yet'}
    if others:
        lines += ['| run | why there is no result |', '|---|---|']
        lines += [f'| {name} | {_cell(why)} |' for name, why in others.items()]
    return lines


def _cell(text: str) -> str:
    """Text that can't break a table."""
    return ' '.join(text.replace('|', '\\|').split())[:300]


def _shown(mean: Mean | None, decimals: int, sign: str = '') -> str:
    if mean is None:
        return NOTHING
    spread = '' if mean.deviation is None else f' ± {mean.deviation:.{decimals}f}'
    return f'{mean.mean:{sign}.{decimals}f}{spread} ({mean.count})'


def _decimals(results: Sequence[Result]) -> int:
    return _places([result.value for result in results])


def _places(values: Sequence[float]) -> int:
    """Decimals for per cent, or for shares of one."""
    return 2 if any(abs(value) > 1 for value in values) else 4
