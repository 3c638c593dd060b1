"""The page that tells which stock models can be pruned, from the rows of a sweep."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmsmart.engine.sweep.stock_models import StockModel

_OTHER_KINDS = 'not of a convolution or linear layer of torch, most often'
_HEAD = """# Which stock models can be pruned

Every distinct model of the configs that {packages} ship, tried on synthetic data
by `tools/sweep.py`. Configs that differ in data, schedule, number of classes, first weights,
assigners or post-processing alone hold one model.

A model is tried in a process of its own: as it is, for one training step; then with
`install_masks(model, sparsity=0.7)`, for one step of the search, hardening, another loss, a plain
checkpoint, and loading that with `strict=True` into the stock model built anew. The weights kept
are counted in what was loaded (weights that start at zero are set to 1e-6 before, so that only
pruning makes zeros), and have to meet the budget exactly: no pruned block fits in what is left of
it. Images are small, and models of more than 60 million parameters get a shallower backbone where
it has a setting for that. A model whose stock step fails here does not count for or against
pruning. One step says that pruning works, not how well.
"""


def markdown(rows: Sequence[dict[str, Any]], models: Sequence[StockModel]) -> str:
    """The page.

    Args:
        rows: Rows of the models that were tried, from :func:`mmsmart.engine.sweep.trial.try_model`.
        models: All distinct models, tried or not.
    """
    packages = sorted({model.package for model in models})
    parts = [_HEAD.format(packages=_listed(packages)), _totals(rows, models, packages)]
    failed = [row for row in rows if row['outcome'] == 'SMART fails']
    parts.append('## Where pruning fails\n')
    parts.append(_table(('config', 'reason'), [(r['config'], r['reason']) for r in failed]))
    parts.append('## What stays dense, and why\n')
    parts.append(_table(('reason', 'weights', 'models'), _dense(rows)))
    parts.append('## Where the stock model fails here\n')
    reasons = Counter(row['reason'] for row in rows if row['outcome'] == 'stock fails')
    examples = {row['reason']: row['config'] for row in reversed(rows)}
    parts.append(
        _table(
            ('reason', 'models', 'for example'),
            [(reason, count, examples[reason]) for reason, count in reasons.most_common()],
        )
    )
    for package in packages:
        parts.append(f'## {package}\n')
        mine = [row for row in rows if row['package'] == package]
        parts.append(_table(_COLUMNS, map(_cells, sorted(mine, key=lambda row: row['config']))))
    return '\n'.join(parts)


def _dense(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Reasons with the number of weights and of models; modules of other kinds are one reason."""
    weights, users, kinds = Counter(), Counter(), Counter()
    for row in rows:
        reasons = Counter()
        for reason, count in row['dense'].items():
            kind, other, _ = reason.partition(' is not a convolution or linear layer')
            if other:
                kinds[kind] += count
            reasons[_OTHER_KINDS if other else reason] += count
        weights.update(reasons)
        users.update(dict.fromkeys(reasons, 1))
    most = ', '.join(f'`{kind}` {count}' for kind, count in kinds.most_common(8))
    return [
        (f'{reason}: {most}' if reason == _OTHER_KINDS else reason, count, users[reason])
        for reason, count in weights.most_common()
    ]


def _totals(
    rows: Sequence[dict[str, Any]], models: Sequence[StockModel], packages: Sequence[str]
) -> str:
    lines = []
    for package in packages:
        mine = [model for model in models if model.package == package]
        tried = [row['outcome'] for row in rows if row['package'] == package]
        version = importlib.import_module(package).__version__
        lines.append(
            (
                f'{package} {version}', sum(m.configs for m in mine), len(mine), len(tried),
                tried.count('stock fails'), tried.count('ok'), tried.count('SMART fails'),
                len(mine) - len(tried),
            )
        )  # fmt: skip
    lines.append(('all', *(sum(column) for column in list(zip(*lines))[1:])))
    titles = (
        'package', 'configs', 'distinct models', 'tried', 'stock fails', '**pruned**',
        'pruning fails', 'not tried',
    )  # fmt: skip
    able = lines[-1][5] + lines[-1][6]
    share = f'{lines[-1][5] / able:.1%}' if able else 'none'
    verdict = f'Of the {able} models whose stock version ran a step, {share} could be pruned.\n'
    if lines[-1][-1]:
        folders = Counter(package for package, _ in _folders(models))
        tried = [StockModel(row['package'], row['config']) for row in rows]
        reached = Counter(package for package, _ in _folders(tried))
        share = ', '.join(f'{p} {reached[p]} of {folders[p]}' for p in packages)
        verdict += (
            'Folders of configs take turns, a model at a time, and the sweep was stopped early.\n'
            f'Folders of which at least one model was tried: {share}.\n'
        )
    return f'{_table(titles, lines)}\n{verdict}'


def _folders(models: Iterable[StockModel]) -> set[tuple[str, Path]]:
    return {(model.package, Path(model.config).parent) for model in models}


_COLUMNS = ('config', 'model', 'image', 'seconds', 'layers', 'blocks', 'left dense', 'outcome')


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    outcome = row['outcome'] if not row['reduced'] else f'{row["outcome"]} ({row["reduced"]})'
    if row['outcome'] != 'ok':
        outcome += f': {row["reason"]}'
    pruned = [f'{row[key]:,}' if row[key] else '' for key in ('layers', 'blocks')]
    dense = sum(row['dense'].values())
    return (row['config'], row['model'], row['input'] or '', f'{row["seconds"]:.0f}', *pruned,
            dense or '', outcome)  # fmt: skip


def _table(titles: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    lines = [' | '.join(str(cell).replace('|', '\\|') for cell in line) for line in lines]
    if not lines:
        return 'None.\n'
    rows = [' | '.join(titles), ' | '.join('---' for _ in titles), *lines]
    return '\n'.join(f'| {row} |' for row in rows) + '\n'


def _listed(names: Sequence[str]) -> str:
    return ' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))
