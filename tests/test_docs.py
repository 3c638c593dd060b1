"""What the documentation shows runs, and what it points to exists."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

import mmsmart

REPO = Path(__file__).parents[1]
PAGES = sorted([REPO / 'README.md', *REPO.glob('docs/**/*.md')])


def blocks(page: Path) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```', page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', page.read_text()):
        assert (page.parent / target).exists(), f'{page.name} links to {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_python_example_parses(page):
    for block in blocks(page):
        assert ast.parse(block).body, f'{page.name} has an empty example'


def test_the_plain_torch_example_prunes_to_its_sparsity():
    (example,) = [b for b in blocks(REPO / 'docs/method.md') if 'remove_masks' in b]
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    names = {
        'model': model,
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        'loss_of': lambda net: net(torch.ones(4, 32)).square().mean(),
        'steps': 20,
        'more_steps': 5,
    }
    exec(example, names)
    weights = [model[0].weight, model[2].weight]
    total = sum(weight.numel() for weight in weights)
    kept = sum(int((weight != 0).sum()) for weight in weights)
    assert total * 0.2 - 16 * 8 < kept <= total * 0.2
    assert mmsmart.masks_of(model) is None


def test_the_table_of_keys_names_every_key_with_its_default():
    from mmsmart.engine.config import Smart

    text = (REPO / 'docs/configuration.md').read_text()
    rows = dict(re.findall(r'^\| `(\w+)` \| `(.+?)` \|', text, flags=re.M))
    assert set(rows) >= {item.name for item in fields(Smart)}
    base: dict = {}
    exec((REPO / 'configs/_base_/smart.py').read_text(), base)
    for key, default in base['smart'].items():
        assert eval(rows[key]) == default, f'docs/configuration.md on {key}'
