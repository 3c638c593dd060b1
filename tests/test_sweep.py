"""The command line of `tools/sweep.py`; what it runs is tested in `engine/`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    'sweep_tool', Path(__file__).parents[1] / 'tools' / 'sweep.py'
)
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


def test_rows_of_a_killed_run_are_read_without_the_one_cut_off(tmp_path):
    file = tmp_path / 'rows.jsonl'
    assert tool.read_rows(file) == []
    file.write_text('{"config": "a"}\n{"config": "b"}\n{"conf')
    assert [row['config'] for row in tool.read_rows(file)] == ['a', 'b']


def test_packages_take_turns_by_their_share():
    assert tool.in_turn(['abcd', 'xy']) == ['a', 'x', 'b', 'c', 'y', 'd']


def test_help_alone_tells_how_to_use_it(capsys):
    with pytest.raises(SystemExit, match='0'):
        tool.parse_args(['--help'])
    text = capsys.readouterr().out
    options = 'packages match limit timeout memory jobs rows resume write'
    assert all(f'--{option}' in text for option in options.split())
