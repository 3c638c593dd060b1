"""What of the stack is there, what is missing, and how to cure it.

Nothing is imported into this process. Versions are read from metadata, and whether a part loads is
tried in a child with a time limit: a package whose libraries don't fit may hang or crash.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SECONDS = 120  # for all imports together; warm they take 3, from a slow disk a minute
_MODELS = {
    'mmpretrain': 'classifiers',
    'mmdet': 'detectors, instance segmentation',
    'mmseg': 'semantic segmentation',
}
_OPS = 'mmcv._ext'  # not a package: the compiled part of mmcv
_FACT = 'mmsmart-health: '  # before each line that the child says


class Part(NamedTuple):
    """A package by its import name, and what each of OpenMMLab's two families calls it."""

    module: str
    original: str
    least: str
    fork: str
    fork_least: str
    needs: tuple[str, ...] = ()
    serves: str = ''


def _same(module: str, distribution: str, least: str, *needs: str, serves: str = '') -> Part:
    return Part(module, distribution, least, distribution, least, needs, serves)


# The least versions are those of requirements/existing.py; a test holds the two together.
PARTS = (
    _same('torch', 'torch', '2.1'),
    _same('torchvision', 'torchvision', '0.15', 'torch', serves='mmpretrain imports it'),
    Part('mmengine', 'mmengine', '0.10', 'onedl-mmengine', '0.10.8', ('torch',)),
    Part('mmcv', 'mmcv', '2.0', 'onedl-mmcv', '2.3', ('mmengine',)),
    Part(
        'mmpretrain', 'mmpretrain', '1.2', 'onedl-mmpretrain', '1.3',
        ('mmcv', 'torchvision'), _MODELS['mmpretrain'],
    ),
    Part(
        'mmdet', 'mmdet', '3.3', 'onedl-mmdetection', '3.5', ('mmcv', _OPS), _MODELS['mmdet'],
    ),
    Part(
        'mmseg', 'mmsegmentation', '1.2', 'onedl-mmsegmentation', '1.4',
        ('mmcv',), _MODELS['mmseg'],
    ),
    _same('torch_pruning', 'torch-pruning', '1.6', serves="optional, for block='channel'"),
    _same('onnx', 'onnx', '1.16', serves='optional, for export to ONNX'),
    _same('onnxruntime', 'onnxruntime', '1.20', serves='optional, runs and checks ONNX files'),
    _same('onnxscript', 'onnxscript', '0.2', serves='optional, for export to ONNX'),
    _same('safetensors', 'safetensors', '0.4', serves='optional, for packed blocks'),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stack:
    """What an environment holds: `versions` and `loads` by import name.

    Args:
        versions: Of the packages that can be found; None where there is no metadata.
        distributions: Names of the installed distributions of OpenMMLab, of either family.
        loads: What trying to import each of them said: `error`, None if it went well, and of torch
            and of mmcv's ops `cuda`.
    """

    versions: Mapping[str, str | None]
    distributions: Sequence[str]
    loads: Mapping[str, Mapping[str, Any]]

    @property
    def is_fork(self) -> bool:
        """Whether the maintained forks are there, or nothing yet that they could disturb."""
        return not self.distributions or any(n.startswith('onedl-') for n in self.distributions)

    @property
    def family(self) -> str:
        """Which of the two families is there, in words."""
        if not self.distributions:
            return 'none yet (what is named above are the maintained forks)'
        if not self.is_fork:
            return 'the original OpenMMLab packages'
        if all(name.startswith('onedl-') for name in self.distributions):
            return 'onedl-*, the maintained forks'
        return (
            f'both, {", ".join(self.distributions)}: they overwrite each other. Uninstall all of '
            'them, then install one family anew'
        )

    def error(self, module: str) -> str | None:
        """Why a part can't be used, or None if it can."""
        part = next((part for part in PARTS if part.module == module), None)
        if part is not None and module not in self.versions:
            return 'missing'
        if part is not None and _is_older(self.versions[module], self._wanted(part)[1]):
            return f'too old, {self._wanted(part)[1]} or later is needed'
        said = self.loads.get(module, {'error': None})['error']
        if said and module == _OPS and 'ModuleNotFoundError' in said:
            return 'mmcv is installed without its compiled ops'
        return said

    def usable(self, module: str) -> bool:
        """Whether a part and all that it needs can be used."""
        needs = next((part.needs for part in PARTS if part.module == module), ())
        return self.error(module) is None and all(map(self.usable, needs))

    @property
    def prunable(self) -> list[str]:
        """The toolboxes whose models can be pruned."""
        return [module for module in _MODELS if self.usable(module)]

    def _wanted(self, part: Part) -> tuple[str, str]:
        return (part.fork, part.fork_least) if self.is_fork else (part.original, part.least)

    def cure(self, *modules: str) -> str:
        """The command that mends a part, or several optional ones."""
        if modules[0] == _OPS or (modules[0] == 'mmcv' and not self.is_fork):
            if not self.is_fork:
                return "python -m pip install openmim && python -m mim install 'mmcv>=2.0,<2.2'"
            cuda = 'FORCE_CUDA=1 ' if self.loads.get('torch', {}).get('gpus') else ''
            options = '--no-build-isolation --no-cache-dir --no-deps --force-reinstall'
            return f"{cuda}MMCV_WITH_OPS=1 python -m pip install {options} 'onedl-mmcv>=2.3'"
        wanted = ['>='.join(self._wanted(part)) for part in PARTS if part.module in modules]
        if 'torchvision' in modules and self.versions.get('torch'):
            # Each torchvision goes with one torch: say which, or pip would replace the one there.
            wanted.append(f'torch=={self.versions["torch"]}')
        return shlex.join(['python', '-m', 'pip', 'install', *wanted])


def look_around(python: str = sys.executable, *options: str, seconds: float = SECONDS) -> Stack:
    """What an interpreter finds and can load.

    Args:
        python: The interpreter.
        options: For it.
        seconds: How long all its imports may take together.

    Raises:
        RuntimeError: If the interpreter doesn't run at all.
    """
    run_this = 'import runpy, sys; runpy.run_path(sys.argv[1], run_name="__main__")'
    command = [python, *options, '-c', run_this, __file__]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, complaint = process.communicate(timeout=seconds)
            end = f'crashes Python (exit status {process.returncode})'
        except subprocess.TimeoutExpired:
            process.kill()
            output, complaint = process.communicate()
            end = f'does not finish loading in {seconds:g} s'
    # Packages may print too.
    found, *facts = [line for line in output.splitlines() if line.startswith(_FACT)] or [None]
    if found is None:
        raise RuntimeError(f'{python} {end}: {complaint.strip()[-500:]}')
    stack = Stack(**json.loads(found.removeprefix(_FACT)), loads={})
    loads = dict(json.loads(fact.removeprefix(_FACT)) for fact in facts)
    first, *others = [*_tried(stack.versions)][len(loads) :] or [None]
    if first is not None:
        loads[first] = {'error': end}
    loads.update({module: {'error': f'not tried: {first} {end}'} for module in others})
    return dataclasses.replace(stack, loads=loads)


def _look() -> Iterator[Any]:
    """In the child: versions and distributions, then what each import says as soon as it is known.

    So a hang or a crash says by itself where it was.
    """
    versions: dict[str, str | None] = {}
    distributions = []
    for part in PARTS:
        if importlib.util.find_spec(part.module) is None:  # finds, does not import
            continue
        versions[part.module] = None
        for name in dict.fromkeys((part.fork, part.original, f'{part.original}-lite')):
            try:
                found = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            versions[part.module] = versions[part.module] or found
            if part.original != part.fork:
                distributions.append(name)
    yield {'versions': versions, 'distributions': distributions}
    for module in _tried(versions):
        yield module, _load(module)


def _load(module: str) -> dict[str, Any]:
    try:
        loaded = importlib.import_module(module)
        if module == 'torch':
            gpus = [loaded.cuda.get_device_name(i) for i in range(loaded.cuda.device_count())]
            return {'error': None, 'cuda': loaded.version.cuda, 'gpus': gpus}
        if module == _OPS:
            return {'error': None, 'cuda': loaded.get_compiling_cuda_version()}
    except BaseException as error:  # whatever a package may raise, the others are tried too
        text = (str(error).strip() or 'no message').splitlines()
        return {'error': f'{type(error).__name__}: {text[-1]}'}
    return {'error': None}


def _tried(versions: Mapping[str, str | None]) -> Iterator[str]:
    """What is imported to see whether it loads: OpenMMLab and what it imports itself."""
    tried = ['torch', 'torchvision', 'mmengine', 'mmcv', _OPS, *_MODELS]
    return (module for module in tried if module.partition('.')[0] in versions)


def report(stack: Stack) -> Iterator[str]:
    """The lines that tell a person what is there, what is not, and what to type."""

    def line(name: str, version: str, text: str) -> str:
        return f'{name:<14} {version:<9} {text}'.rstrip()

    yield line('python', platform.python_version(), '')
    spare = []
    for part in PARTS:
        error, optional = stack.error(part.module), part.serves.startswith('optional')
        version = stack.versions.get(part.module) or ('-' if error == 'missing' else 'unknown')
        texts = [error, part.serves] if error else []
        yield line(part.module, version, '; '.join([*texts, *_notes(stack, part)]))
        if optional and error:
            spare.append(part.module)
        elif error:  # mmdet and mmseg refuse an mmcv that is not of their time
            yield line('', '', stack.cure(_OPS if 'MMCV==' in error else part.module))
        elif part.module == 'mmcv' and (complaint := _about_ops(stack)):
            yield line('', '', complaint)
            yield line('', '', stack.cure(_OPS))
    if spare:
        yield ''
        yield 'for what is optional: ' + stack.cure(*spare)
    yield ''
    yield f'family: {stack.family}'
    if stack.prunable:
        models = ', '.join(f'{module} ({_MODELS[module]})' for module in stack.prunable)
        yield f'ready to prune: {models}'
    else:
        lacking = 'no toolbox can be used' if stack.usable('torch') else 'torch can not be used'
        yield f'not ready: {lacking}. Type what is named above, or `make demo` in a checkout.'


def _notes(stack: Stack, part: Part) -> Iterator[str]:
    """What else is worth a word about a part that is there."""
    if part.module == 'torch' and not stack.error('torch'):
        cuda, gpus = stack.loads['torch'].get('cuda'), stack.loads['torch'].get('gpus') or []
        where = f'{len(gpus)} x {gpus[0]}' if gpus else 'no GPU in sight'
        yield f'CUDA {cuda}, {where}' if cuda else 'for the CPU'
    yield from (name for name in stack.distributions if name in (part.original, part.fork))
    if part.module == 'mmcv' and not stack.error('mmcv') and not stack.error(_OPS):
        cuda = stack.loads.get(_OPS, {}).get('cuda')
        on_gpu = cuda and cuda != 'not available'
        yield f'ops compiled for {f"CUDA {cuda}" if on_gpu else "the CPU"}'


def _about_ops(stack: Stack) -> str | None:
    """What is wrong with mmcv's compiled ops, or None."""
    error = stack.error(_OPS)
    if error:
        return f'{error}; mmdet needs them'
    compiled = stack.loads.get(_OPS, {}).get('cuda')
    if stack.loads.get('torch', {}).get('gpus') and compiled == 'not available':
        return 'its ops run on the CPU alone: detectors will fail on the GPU in sight'
    return None


def _is_older(version: str | None, least: str) -> bool:
    """Whether a version is known and below the least.

    >>> _is_older('2.11.0+cpu', '2.9'), _is_older('1.13.1', '2.0'), _is_older(None, '2.0')
    (False, True, False)
    """
    numbers = [re.match(r'\d+(\.\d+)*', text or '') for text in (version, least)]
    if None in numbers:
        return False
    own, wanted = (tuple(map(int, found[0].split('.'))) for found in numbers)
    return own < wanted


if __name__ == '__main__':  # in the child
    for fact in _look():
        print(f'\n{_FACT}{json.dumps(fact)}', flush=True)
