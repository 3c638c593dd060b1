"""YAML as a person means it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, without two traps of YAML 1.1.

    A key given twice is an error, and `1e-3` is a number.

    Raises:
        ValueError: If it is no YAML, or a key is given twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> Any:
            # Later on, when `<<` is read, what it merges stands beside the keys that were written.
            node = super().compose_mapping_node(anchor)
            _expect_once([key.value for key, _ in node.value], node.start_mark.line + 1)
            return node

    number = re.compile(r'[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$')
    Loader.add_implicit_resolver('tag:yaml.org,2002:float', number, list('-+0123456789'))
    try:
        return yaml.load(path.read_text(encoding='utf-8'), Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f'is no YAML: {error}') from error


def _expect_once(keys: Iterable[Any], line: int) -> None:
    seen = set()
    for key in keys:
        if key != '<<' and str(key) in seen:
            raise ValueError(f'{key}: given twice in the mapping that begins in line {line}.')
        seen.add(str(key))
