# Copyright (c) mmsmart contributors.
"""What an environment that already has torch and MMEngine lacks, seen without importing anything.

OpenMMLab's packages exist in two families with the same import names: the originals and the
maintained `onedl-*` forks. Installing one over the other breaks both, so nothing here installs:
what is missing is named, with the command that cures it for the family that is there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple


class Need(NamedTuple):
    """A package by its import name, and what each family calls it."""

    module: str
    original: str
    least: str
    fork: str
    fork_least: str


def _same_in_both(module: str, distribution: str, least: str) -> Need:
    return Need(module, distribution, least, distribution, least)


# The least versions are the last minor releases of the originals, and the first of each fork that
# was tried. setup.py has the same numbers in its extras; a test holds the two together.
_NEEDS = [
    _same_in_both('torch', 'torch', '2.1'),
    _same_in_both('torchvision', 'torchvision', '0.15'),
    Need('mmengine', 'mmengine', '0.10', 'onedl-mmengine', '0.10.8'),
    Need('mmcv', 'mmcv', '2.0', 'onedl-mmcv', '2.3'),
    Need('mmpretrain', 'mmpretrain', '1.2', 'onedl-mmpretrain', '1.3'),
    Need('mmdet', 'mmdet', '3.3', 'onedl-mmdetection', '3.5'),
    Need('mmseg', 'mmsegmentation', '1.2', 'onedl-mmsegmentation', '1.4'),
    _same_in_both('numpy', 'numpy', '1.23'),
    _same_in_both('matplotlib', 'matplotlib', '3.5'),
    _same_in_both('sklearn', 'scikit-learn', '1.2'),
    _same_in_both('torch_pruning', 'torch-pruning', '1.6'),
    _same_in_both('onnx', 'onnx', '1.16'),
    _same_in_both('onnxruntime', 'onnxruntime', '1.20'),
    _same_in_both('onnxscript', 'onnxscript', '0.2'),
    _same_in_both('safetensors', 'safetensors', '0.4'),
    _same_in_both('pytest', 'pytest', '7.4'),
    _same_in_both('hypothesis', 'hypothesis', '6.80'),
    _same_in_both('ruff', 'ruff', '0.17'),
    _same_in_both('mkdocs', 'mkdocs', '1.6'),
    _same_in_both('material', 'mkdocs-material', '9.6'),
    _same_in_both('mkdocstrings', 'mkdocstrings-python', '2.0'),
    _same_in_both('latex2mathml', 'latex2mathml', '3.78'),
]
NEEDS = {need.module: need for need in _NEEDS}
MMCV_OPS = 'mmcv._ext'  # not a package: the compiled part of mmcv

_DEMO = ['torch', 'torchvision', 'mmengine', 'mmcv', 'mmpretrain', 'numpy', 'matplotlib', 'sklearn']
_EXPORT = ['onnx', 'onnxruntime', 'onnxscript', 'safetensors']
PARTS = {
    'lint': ['ruff'],
    'docs': ['mkdocs', 'material', 'mkdocstrings', 'latex2mathml'],
    'demo': _DEMO,
    'demo-seg': [*_DEMO, 'mmseg'],
    'demo-det': [*_DEMO, MMCV_OPS, 'mmdet'],
    'test': [*_DEMO, MMCV_OPS, 'mmdet', 'mmseg', 'torch_pruning', *_EXPORT, 'pytest', 'hypothesis'],
}


class Environment(NamedTuple):
    """What is importable, by import name; a source tree without metadata has the version None."""

    python: str
    versions: dict[str, str | None]
    has_fork: bool

    @property
    def is_ready_made(self) -> bool:
        """Whether somebody has already set up torch and MMEngine here."""
        return 'torch' in self.versions and 'mmengine' in self.versions

    @property
    def family(self) -> str:
        """The name of the family of OpenMMLab packages that is installed."""
        return 'maintained forks, onedl-*' if self.has_fork else 'original OpenMMLab packages'


def look_around(python: str) -> Environment:
    """Look at the environment of the running interpreter, called `python` in the cures."""
    versions: dict[str, str | None] = {}
    has_fork = False
    for need in _NEEDS:
        if importlib.util.find_spec(need.module) is None:  # finds, does not import
            continue
        versions[need.module] = None
        for distribution in (need.fork, need.original, f'{need.original}-lite'):
            try:
                versions[need.module] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            has_fork |= distribution.startswith('onedl-')
            break
    if 'mmcv' in versions:
        folders = importlib.util.find_spec('mmcv').submodule_search_locations or ()
        if any(file.suffix in ('.so', '.pyd') for f in folders for file in Path(f).glob('_ext*')):
            versions[MMCV_OPS] = None
    return Environment(python, versions, has_fork)


def shortfalls(environment: Environment, part: str) -> list[str]:
    """Name what `make <part>` lacks in this environment, each with its cure; empty if nothing."""
    lines = []
    for module in PARTS[part]:
        present = module in environment.versions
        if module == MMCV_OPS:
            if not present and 'mmcv' in environment.versions:
                lines += [
                    f'{MMCV_OPS}: mmcv was installed without its compiled ops, mmdet needs them'
                ]
                lines += [f'    {_cure_for_ops(environment)}']
            continue
        need = NEEDS[module]
        name, least = need.original, need.least
        if environment.has_fork:
            name, least = need.fork, need.fork_least
        version = environment.versions.get(module)
        if not present:
            lines.append(f'{name}: not installed, {least} or later is needed')
        elif version is not None and _numbers(version) < _numbers(least):
            lines.append(f'{name}: {version} is too old, {least} or later is needed')
        else:
            continue
        if module == 'mmcv' and MMCV_OPS in PARTS[part]:
            lines.append(f'    {_cure_for_ops(environment)}')
        else:
            lines.append(f'    {_cure(environment, name, least)}')
    return lines


def _cure(environment: Environment, name: str, least: str) -> str:
    wanted = [f'{name}>={least}']
    if name == 'torchvision' and environment.versions.get('torch'):
        # Each torchvision goes with one torch: say which, or pip would replace the one there.
        wanted.append(f'torch=={environment.versions["torch"]}')
    return shlex.join([environment.python, '-m', 'pip', 'install', *wanted])


def _cure_for_ops(environment: Environment) -> str:
    python = shlex.quote(environment.python)
    if environment.has_fork:
        flags = '--no-build-isolation --no-cache-dir --no-deps --force-reinstall'
        return f"MMCV_WITH_OPS=1 {python} -m pip install {flags} 'onedl-mmcv>=2.3'"
    return f"{python} -m pip install openmim && {python} -m mim install 'mmcv>=2.0,<2.2'"


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version as numbers.

    >>> _numbers('2.11.0+cpu') < _numbers('2.9')
    False
    """
    return tuple(int(number) for number in re.match(r'\d+(\.\d+)*', version)[0].split('.'))
