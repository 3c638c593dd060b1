"""Make `prune_digits.ipynb` of `prune_digits.py`: `python notebooks/convert.py`.

A line `# %%` begins a cell of code, `# %% [markdown]` one of text. Outputs of cells whose source is
as it was are kept; to make them anew, run the notebook and save it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name('prune_digits.py')
NOTEBOOK = SCRIPT.with_suffix('.ipynb')


def cells(script: str) -> list[tuple[str, str]]:
    r"""Kind ('code' or 'markdown') and source of every cell.

    >>> cells('# %% [markdown]\\n# # Title\\n#\\n# Text.\\n\\n# %%\\nx = 1\\n')
    [('markdown', '# Title\\n\\nText.'), ('code', 'x = 1')]
    """
    found = []
    for kind, source in re.findall(
        r'^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)', script, re.M | re.S
    ):
        if kind:
            source = re.sub(r'^# ?', '', source, flags=re.M)
        found.append(('markdown' if kind else 'code', source.strip()))
    return found


def notebook(script: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The notebook of a script, with the outputs that an earlier one has of the same cells."""
    kept = {''.join(cell['source']): cell for cell in (before or {}).get('cells', [])}
    made = []
    for number, (kind, source) in enumerate(cells(script)):
        cell = dict(id=f'cell-{number}', cell_type=kind, metadata={}, source=_lines(source))
        if kind == 'code':
            old = kept.get(source, {})
            cell['execution_count'] = old.get('execution_count')
            cell['outputs'] = old.get('outputs', [])
        made.append(cell)
    kernel = dict(display_name='Python 3', language='python', name='python3')
    return dict(cells=made, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def _lines(source: str) -> list[str]:
    return source.splitlines(keepends=True)


def main() -> None:
    before = json.loads(NOTEBOOK.read_text()) if NOTEBOOK.exists() else None
    text = json.dumps(notebook(SCRIPT.read_text(), before), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(f'{text}\n')


if __name__ == '__main__':
    main()
