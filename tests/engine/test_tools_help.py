"""`--help` of every tool of ours is enough to use it."""

from __future__ import annotations

import re
import runpy
import sys

import pytest

from engine.runs import REPO

STOCK = {'train.py', 'test.py'}  # theirs is the help of the stock tool
TOOLS = sorted(path.name for path in (REPO / 'tools').glob('*.py') if path.name not in STOCK)


@pytest.mark.parametrize('tool', TOOLS)
def test_help_has_an_example_and_a_word_on_every_argument(tool, monkeypatch, capsys):
    main = runpy.run_path(str(REPO / 'tools' / tool))['main']
    monkeypatch.setattr(sys, 'argv', [f'tools/{tool}', '--help'])
    monkeypatch.setenv('COLUMNS', '100')
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf'^    python tools/{tool}', text, flags=re.M)
    entries = re.split(r'\n  (?=[-\w{])', text.partition('positional arguments:')[2] or text)
    for entry in entries[1:]:
        flat = ' '.join(entry.split())
        assert re.search(r'(\s{2,}|\n\s+)\S', entry.strip()), f'{tool} says nothing of {flat}'
