"""Tests of who may import whom: rooms open downwards only, and the stairs end at torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmsmart'
UPSTREAM = {'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'mmseg'}

# A room may import rooms of a lower floor, and its own modules.
FLOOR = {
    'version': 0,
    'functional': 0,
    'executor': 0,
    'registry': 0,
    'shipped': 0,
    'health': 0,
    'pruning_json': 0,
    'layer_rules': 0,
    'blocks': 1,
    'shrink': 1,
    'budget': 1,
    'dependency': 2,
    'latency': 2,
    'channels': 3,
    'cost': 4,
    'importance': 4,
    'plans': 5,
    'methods': 6,
    'masking': 7,
    'install': 8,
    'export': 9,
    'packed': 10,
    'report': 10,
    'drawing': 11,
    'html_report': 12,
    'sensitivity': 10,
    'compare': 10,
    '__init__': 11,
    'engine': 13,
    'datasets': 13,
    '__main__': 13,
}
MAY_IMPORT_UPSTREAM = {'registry', 'engine', 'datasets'}


def imported(source, package):
    """Names of all modules that the source imports, wherever in it, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[: len(package.split('.')) - node.level + 1]
            start = '.'.join(base) if node.level else ''
            name = '.'.join(part for part in (start, node.module) if part)
            # `from mmsmart import masking` imports a module too.
            yield from (f'{name}.{alias.name}' for alias in node.names)


def complaints(file, source):
    """What the source at this path inside the package imports but must not."""
    room = file.parts[0].removesuffix('.py')
    package = '.'.join(['mmsmart', *file.parts[:-1]])
    for name in imported(source, package):
        top, *rest = name.split('.')
        if top in UPSTREAM and room not in MAY_IMPORT_UPSTREAM:
            yield f'{file} imports {name}'
        if top == 'mmsmart':
            other = rest[0] if rest and rest[0] in FLOOR else '__init__'
            if other != room and FLOOR[other] >= FLOOR[room]:
                yield f'{file} imports {name}, which does not lie below it'


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('file', FILES, ids=str)
def test_imports_run_downward_only(file):
    assert file.parts[0].removesuffix('.py') in FLOOR, 'give the new room a floor'
    assert list(complaints(file, (PACKAGE / file).read_text())) == []


@pytest.mark.parametrize(
    ('file', 'source'),
    [
        ('blocks.py', 'import mmengine'),
        ('masking.py', 'def f():\n    from mmengine.runner import Runner'),
        ('report.py', 'if True:\n    import mmcv.ops as ops'),
        ('blocks.py', 'from mmsmart.masking import install_masks'),
        ('blocks.py', 'from . import masking'),
        ('cost.py', 'from mmsmart.importance import magnitude'),
        ('masking.py', 'from mmsmart import report'),
        ('masking.py', 'import mmsmart'),
        ('export.py', 'import mmsmart.engine'),
        ('functional/topk.py', 'from ..blocks import find_layers'),
        ('functional/topk.py', 'from mmsmart import blocks'),
        ('engine/runner.py', 'from mmsmart.datasets import Digits'),
    ],
)
def test_the_check_sees_an_import_that_goes_up(file, source):
    assert len(list(complaints(Path(file), source))) == 1


@pytest.mark.parametrize(
    ('file', 'source'),
    [
        ('blocks.py', 'import torch\nfrom mmsmart.functional import block_grid'),
        ('report.py', 'from .masking import BlockMasks'),
        ('functional/topk.py', 'from .threshold import solve_threshold\nfrom . import _checks'),
        ('engine/runner.py', 'from mmengine.runner import Runner\nimport mmsmart'),
        ('registry.py', 'from mmengine.registry import Registry'),
    ],
)
def test_the_check_lets_pass_what_goes_down(file, source):
    assert list(complaints(Path(file), source)) == []


def loaded_by(statement):
    """Names of top-level modules in a new process after this statement."""
    script = f'{statement}\nimport sys\nprint(*{{name.split(".")[0] for name in sys.modules}})'
    done = subprocess.run(
        [sys.executable, '-c', script],
        cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_what_needs_torch_alone_imports_nothing_of_openmmlab():
    rooms = sorted(set(FLOOR) - MAY_IMPORT_UPSTREAM - {'__init__', '__main__'})
    loaded = loaded_by('import ' + ', '.join(f'mmsmart.{room}' for room in rooms))
    assert {'mmsmart', 'torch'} <= loaded
    assert not loaded & UPSTREAM
    assert not loaded & {'matplotlib', 'rich'}  # only where a report is drawn


def test_the_registry_is_where_mmengine_comes_in():
    assert 'mmengine' in loaded_by('import mmsmart.registry')
