"""The notebook is what its script makes, and the script prunes."""

from __future__ import annotations

import json
import os
import runpy

from engine.runs import REPO, assert_finished, assert_on_budget, pruned_weights

NOTEBOOKS = REPO / 'notebooks'
SCRIPT = NOTEBOOKS / 'prune_digits.py'
NOTEBOOK = json.loads((NOTEBOOKS / 'prune_digits.ipynb').read_text())
CONVERT = runpy.run_path(str(NOTEBOOKS / 'convert.py'))


def test_the_notebook_holds_the_cells_of_the_script():
    assert CONVERT['notebook'](SCRIPT.read_text(), NOTEBOOK) == NOTEBOOK


def test_cells_are_cut_where_the_script_says():
    script = '# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n\n# %%\ny = "# %%"\n'
    assert CONVERT['cells'](script) == [
        ('markdown', '# Title\n\nText.'),
        ('code', 'x = 1'),
        ('code', 'y = "# %%"'),
    ]


def test_an_output_is_kept_with_the_cell_that_made_it_and_no_other():
    before = CONVERT['notebook']('# %%\nx = 1\n# %%\nprint(x)\n')
    before['cells'][1].update(outputs=['1'], execution_count=2)
    kept = CONVERT['notebook']('# %%\nx = 2\n# %%\nprint(x)\n', before)
    assert [cell['outputs'] for cell in kept['cells']] == [[], ['1']]
    lost = CONVERT['notebook']('# %%\nx = 1\n# %%\nprint(x + 1)\n', before)
    assert [cell['outputs'] for cell in lost['cells']] == [[], []]


def test_the_notebook_shows_what_came_of_each_step():
    cells = [cell for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']
    outputs = [output for cell in cells for output in cell['outputs']]
    pictures = [output for output in outputs if 'image/png' in output.get('data', {})]
    assert len(pictures) == SCRIPT.read_text().count('\nshow(')
    assert not [output for output in outputs if output['output_type'] == 'error']


def run_shortened(folder: str) -> None:
    from mmsmart.datasets import Digits

    every_digit = Digits.load_data_list
    Digits.load_data_list = lambda self: every_digit(self)[:64]
    os.chdir(folder)
    script = SCRIPT.read_text()
    for name, epochs in (('DENSE_EPOCHS', 1), ('PRUNING_EPOCHS', 3)):
        (line,) = [line for line in script.splitlines() if line.startswith(f'{name} = ')]
        script = script.replace(line, f'{name} = {epochs}')
    exec(compile(script, SCRIPT.name, 'exec'), {})


def test_the_script_prunes_and_draws_every_picture(tmp_path):
    assert_finished(run_shortened, str(tmp_path), log=tmp_path / 'log.txt')
    folder = tmp_path / 'work_dirs/notebook'
    assert_on_budget(folder / 'pruned')
    assert pruned_weights(folder / 'pruned')
    drawn = {path.stem for path in folder.glob('*.png')}
    assert drawn == {'digits', 'hardening', 'layers', 'blocks'}
