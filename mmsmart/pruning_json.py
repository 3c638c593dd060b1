"""The reader of `pruning.json`: every field is checked before anybody computes with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_BYTES = 256 * 2**20  # a report has some hundred bytes for each layer of a network
_MOST_AXES = 6


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a `pruning.json`, checked field by field; further fields are left as they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not one, or damaged; the message names the file and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file; a run writes it when it ends.')
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f'{path}: larger than {_MOST_BYTES:,} bytes: another kind of file.')
    try:
        report = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no text, no JSON, or numbers without end
        raise ValueError(f'{path}: not JSON, or cut short ({error}).') from error
    if not isinstance(report, dict):
        raise ValueError(f'{path}: expected an object, got {type(report).__name__}.')
    for field, found, expected in _mistakes(report):
        raise ValueError(f'{path}: {field}: expected {expected}, got {found!r:.80}.')
    return report


_Mistake = tuple[str, Any, str]  # field, what is there, what should be


def _mistakes(report: dict[str, Any]) -> Iterator[_Mistake]:
    for field in ('method', 'resource'):
        if not isinstance(report.get(field), str):
            yield field, report.get(field), 'a string'
    yield from _amounts('', report, ('target_sparsity', 'achieved_sparsity'))
    yield from _amounts('', report, ('budget', 'kept', 'next_block_cost'))
    for field in ('dense', 'pruned'):
        figures = report.get(field)
        if not isinstance(figures, dict):
            yield field, figures, 'an object of figures'
            continue
        yield from _counts(f'{field}.', figures, ('params', 'macs'))
        for key, value in figures.items():
            if not (value is None or _is_number(value)):
                yield f'{field}.{key}', value, 'a number or null'
    for field, check in (('layers', _layer), ('excluded', _excluded), ('budgets', _budget)):
        rows = report.get(field, [] if field == 'budgets' else None)
        if not isinstance(rows, list):
            yield field, rows, 'a list'
            continue
        for index, row in enumerate(rows):
            where = f'{field}[{index}]'
            if isinstance(row, dict):
                yield from check(f'{where}.', row)
            else:
                yield where, row, 'an object'


def _layer(where: str, row: dict[str, Any]) -> Iterator[_Mistake]:
    if not isinstance(row.get('name'), str):
        yield f'{where}name', row.get('name'), 'a string'
    shape, block = row.get('shape'), row.get('block')
    if not _is_shape(shape):
        yield f'{where}shape', shape, f'1 to {_MOST_AXES} integers above 0'
    if not isinstance(block, str) and not (_is_shape(block) and len(block) == len(shape)):
        yield f'{where}block', block, 'a name, or as many integers as `shape` has'
    if not _is_count(row.get('groups')) or row['groups'] < 1:
        yield f'{where}groups', row.get('groups'), 'an integer above 0'
    for kind in ('blocks', 'params', 'macs'):
        total, kept = row.get(f'{kind}_total'), row.get(f'{kind}_kept')
        if not _is_count(total):
            yield f'{where}{kind}_total', total, 'an integer of at least 0'
        elif not _is_count(kept) or kept > total:
            yield f'{where}{kind}_kept', kept, f'an integer from 0 to {total}'


def _excluded(where: str, row: dict[str, Any]) -> Iterator[_Mistake]:
    for field in ('name', 'reason'):
        if not isinstance(row.get(field), str):
            yield f'{where}{field}', row.get(field), 'a string'


def _budget(where: str, row: dict[str, Any]) -> Iterator[_Mistake]:
    for field in ('part', 'resource'):
        if not isinstance(row.get(field), str):
            yield f'{where}{field}', row.get(field), 'a string'
    amounts = ('target_sparsity', 'total', 'budget', 'kept', 'next_block_cost')
    yield from _amounts(where, row, amounts)


def _amounts(where: str, row: dict[str, Any], fields: tuple[str, ...]) -> Iterator[_Mistake]:
    for field in fields:
        if not _is_number(row.get(field)) or row[field] < 0:
            yield f'{where}{field}', row.get(field), 'a number of at least 0'


def _counts(where: str, row: dict[str, Any], fields: tuple[str, ...]) -> Iterator[_Mistake]:
    for field in fields:
        if not _is_count(row.get(field)):
            yield f'{where}{field}', row.get(field), 'an integer of at least 0'


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= _MOST_AXES
        and all(_is_count(size) and 1 <= size < 2**31 for size in value)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 and math.isfinite(value)
