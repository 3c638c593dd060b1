"""Rows of probes on their way to a file and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def place_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells the probe of one row from every other."""
    keys = ('what', 'name', 'density', 'resource', 'sparsity', 'rules')
    return tuple(json.dumps(row.get(key)) for key in keys)


def rows_of(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same settings; a last line cut off by a kill is dropped.

    Raises:
        ValueError: If they were measured with other settings, naming them.
    """
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if not found:
        return []
    theirs, mine = found[0].get('settings', {}), json.loads(json.dumps(settings))
    other = [key for key in mine if theirs.get(key) != mine[key]]
    if other:
        raise ValueError(
            f'resume: {file} was measured with another {", another ".join(other)}. Go on with the '
            'same config, checkpoint and --images, choose another --out, or leave --resume out.'
        )
    return found[1:]
