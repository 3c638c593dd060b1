"""The page of a sweep: every model is in it, and its sums are those of the rows."""

from __future__ import annotations

from mmsmart.engine.sweep.page import markdown
from mmsmart.engine.sweep.stock_models import StockModel

MODELS = [StockModel('mmdet', f'a/{i}.py', configs=i + 1) for i in range(4)]


def a_row(index, **changes):
    return {
        'package': 'mmdet', 'config': f'a/{index}.py', 'configs': index + 1, 'model': 'FCOS',
        'input': 64, 'reduced': '', 'layers': 3, 'blocks': 1200,
        'dense': {'frozen': 2}, 'outcome': 'ok', 'reason': '', 'seconds': 1.6, **changes,
    }  # fmt: skip


def cells(page, start):
    return [line.split(' | ')[1:] for line in page.splitlines() if line.startswith(start)]


def test_totals_count_configs_models_and_outcomes():
    rows = [
        a_row(0),
        a_row(1, outcome='SMART fails', reason='ValueError: a | b'),
        a_row(2, outcome='stock fails', reason='no lap', dense={}),
    ]
    page = markdown(rows, MODELS)
    assert cells(page, '| mmdet ') == [['10', '4', '3', '1', '1', '1', '1 |']]
    assert cells(page, '| all ') == [['10', '4', '3', '1', '1', '1', '1 |']]
    assert '50.0%' in page
    assert '| no lap | 1 | a/2.py |' in page
    assert '| frozen | 4 | 2 |' in page
    assert r'| a/1.py | ValueError: a \| b |' in page
    assert 'at least one model was tried: mmdet 1 of 1.' in page


def test_a_reduced_model_says_so_in_its_row():
    page = markdown([a_row(0, reduced='depth 101 to 50')], MODELS[:1])
    assert '| a/0.py | FCOS | 64 | 2 | 3 | 1,200 | 2 | ok (depth 101 to 50) |' in page
    assert '## Where pruning fails\n\nNone.' in page
    assert 'stopped early' not in page


def test_modules_of_other_kinds_are_one_reason_that_names_them():
    other = ' is not a convolution or linear layer'
    rows = [
        a_row(0, dense={f'Embedding{other}': 1, f'DINO{other}': 2}),
        a_row(1, dense={f'DINO{other}': 2, 'frozen': 1}),
    ]
    page = markdown(rows, MODELS)
    assert 'most often: `DINO` 4, `Embedding` 1 | 5 | 2 |' in page
    assert '| frozen | 1 | 1 |' in page
