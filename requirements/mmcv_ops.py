# Copyright (c) mmsmart contributors.
"""mmcv with its compiled ops, built once for each Python and torch version of this user.

onedl-mmcv is published as source only. Its ops are linked against one torch version, which pip's
own cache knows nothing of, so the wheel is kept in a cache of ours whose folder names both. The
source is unpacked and compiled in that folder too: an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

from steps import Failed, only_one_in, run, say, step

CPU_MINUTES = 26  # measured for 78 source files with g++ 12
TEMPORARY = 'unfinished-'  # how folders are called that are of no use to a later run
SECONDS_PER_LINE = 30  # of progress
GIB_PER_JOB = 1.5  # memory of one compiler at work, rounded up


class Target(NamedTuple):
    """What a compiled wheel depends on."""

    mmcv: str  # version
    python: str  # tag, as in cp311
    torch: str  # version, with its local part if it has one
    platform: str  # as in linux_x86_64

    @classmethod
    def of(cls, python: Path, mmcv: str) -> Target:
        """What fits the torch and the Python of this interpreter."""
        code = (
            'import sys, sysconfig, importlib.metadata as metadata\n'
            'print("cp%d%d" % sys.version_info[:2])\n'
            'print(metadata.version("torch"), sysconfig.get_platform())'
        )
        output = subprocess.check_output([python, '-Ic', code], text=True)
        tag, torch, platform = output.split()
        return cls(mmcv, tag, torch, re.sub(r'\W', '_', platform))

    @property
    def folder(self) -> Path:
        """Where the wheel is kept, and where it is built."""
        return _cache() / f'{self.python}-torch{self.torch}-{self.platform}'

    def cached_wheel(self) -> Path | None:
        """The finished wheel, if there is one."""
        return next(self.folder.glob(f'onedl_mmcv-{self.mmcv}-*.whl'), None)


def _cache() -> Path:
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'mmsmart' / 'wheels'


def may_have_to_build(mmcv: str, torch: str) -> bool:
    """Whether no wheel for this torch is in the cache; asked before any torch is installed."""
    return not any(_cache().glob(f'*-torch{torch}*/onedl_mmcv-{mmcv}-*.whl'))


def check_tools() -> None:
    """Raise Failed if this machine has no C++ compiler or no headers of Python."""
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if shutil.which(compiler) is None:
        raise Failed(
            f'There is no C++ compiler ({compiler}), which mmcv needs for its detection ops.\n'
            'Install one and run this again:\n'
            '  Debian, Ubuntu: apt install g++        Fedora: dnf install gcc-c++\n'
            '  macOS: xcode-select --install          conda: conda install cxx-compiler'
        )
    header = Path(sysconfig.get_path('include')) / 'Python.h'
    if not header.exists():
        version = sysconfig.get_python_version()
        raise Failed(
            f"Python's headers are missing ({header}); mmcv needs them for its detection ops.\n"
            'Install them and run this again:\n'
            f'  Debian, Ubuntu: apt install python{version}-dev\n'
            f'  Fedora: dnf install python{version}-devel'
        )


def wheel(target: Target, python: Path, pip: Callable) -> Path:
    """Return the wheel for this target from the cache, after building it if need be.

    Args:
        target: What it has to fit.
        python: An interpreter that has torch, setuptools and ninja.
        pip: Runs pip: `pip(*arguments, log=...)`.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    with only_one_in(target.folder):
        found = target.cached_wheel()
        if found:
            say(f'* mmcv with its compiled ops is in the cache: {found}')
            return found
        check_tools()
        for leftover in target.folder.glob(f'{TEMPORARY}*'):  # of a run that was killed
            shutil.rmtree(leftover)
        jobs = os.environ.get('MAX_JOBS') or str(_jobs())
        minutes = CPU_MINUTES // int(jobs) + 1
        with step(
            f'compiling the ops of mmcv {target.mmcv}, once for this torch, {jobs} files at a time',
            f'{minutes} min',
        ):
            source = _source(target, pip)
            return _compile(target, source, python, jobs)


def _source(target: Target, pip: Callable) -> Path:
    """Download and unpack the source, or return what an earlier run has unpacked."""
    source = target.folder / f'source-{target.mmcv}'
    if source.is_dir():
        say('  going on with the build that was interrupted')
        return source
    with tempfile.TemporaryDirectory(dir=target.folder, prefix=TEMPORARY) as folder:
        options = ['--no-deps', '--no-cache-dir', '--no-binary', 'onedl-mmcv', '--dest', folder]
        pip('download', *options, f'onedl-mmcv=={target.mmcv}', log=target.folder / 'build.log')
        archive = next(Path(folder).glob('*.tar.gz'))
        shutil.unpack_archive(archive, folder)
        unpacked = next(path for path in Path(folder).iterdir() if path.is_dir())
        unpacked.rename(source)  # complete, or not there at all
    return source


def _compile(target: Target, source: Path, python: Path, jobs: str) -> Path:
    log = target.folder / 'build.log'
    # Built for the CPU on every machine: a CUDA build would need a matching toolkit and an hour.
    # To train detectors on a GPU, bring an environment of your own.
    environment = {'MMCV_WITH_OPS': '1', 'FORCE_CUDA': '0', 'CUDA_VISIBLE_DEVICES': ''}
    environment.update(MAX_JOBS=jobs, PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}')
    with tempfile.TemporaryDirectory(dir=target.folder, prefix=TEMPORARY) as folder:
        run(
            [python, 'setup.py', 'bdist_wheel', '--dist-dir', folder],
            log=log,
            show=_Progress(),
            cwd=source,
            env={**os.environ, **environment},
            causes='Likely causes: (a) the compiler is older than g++ 9 or clang 10; (b) memory '
            'ran out ("Killed"): run again with MAX_JOBS=1; (c) the disk is full.\n'
            f'What is compiled is kept, and the next run goes on from there; delete {source} to '
            'begin anew.',
        )
        built = next(Path(folder).glob('*.whl'))
        with zipfile.ZipFile(built) as archive:
            if not any(name.startswith('mmcv/_ext') for name in archive.namelist()):
                raise Failed(f'The build of mmcv ended without its compiled ops. See {log}')
        finished = target.folder / built.name
        built.rename(finished)  # complete, or not there at all
    shutil.rmtree(source)  # objects and all
    return finished


class _Progress:
    """Turns ninja's `[12/78] c++ ...` into a line now and then."""

    def __init__(self) -> None:
        self.next = 0.0

    def __call__(self, line: str) -> str | None:
        counted = re.match(r'\[(\d+)/(\d+)\]', line)
        if not counted or (time.monotonic() < self.next and counted[1] != counted[2]):
            return None
        self.next = time.monotonic() + SECONDS_PER_LINE
        return f'{counted[1]} of {counted[2]} files'


def _jobs() -> int:
    """As many compilers as there are cores for this process and memory for each."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    )
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return max(1, min(cores, int(memory / GIB_PER_JOB)))


def check_loads(python: Path, wheel: Path) -> None:
    """Raise Failed if the installed ops do not load: the cached wheel is of another system."""
    result = subprocess.run(
        [python, '-Ic', 'import torch, mmcv._ext'], capture_output=True, text=True
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ['no message'])[-1]
        raise Failed(
            f'The compiled ops of mmcv do not load: {reason}\n'
            f'Delete {wheel} and run this again to build it anew.'
        )
