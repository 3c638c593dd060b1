# Copyright (c) mmsmart contributors.
"""Set up what a part of the Makefile needs, then run a command with it.

    python3 requirements/install.py demo tools/demo.py
    python3 requirements/install.py test -m pytest

There are two cases:

* The Python that runs this file already has torch and MMEngine. It is used as it is, nothing is
  installed or changed; what is missing or too old is named with its cure.
* Otherwise `.venv` is made beside the Makefile and filled with the pinned versions. That can be
  interrupted at any point and started again, and costs nothing once it is complete.

This runs before anything is installed, so it needs the standard library only, and it is written so
that an older Python gets a message rather than a SyntaxError.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

import existing
import mmcv_ops
from steps import Failed, duration, only_one_in, run, say, step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / '.venv'
VENV_PYTHON = VENV / 'bin' / 'python'
STATE = (
    VENV / 'mmsmart-setup.json'
)  # what is known to be complete; its presence says that .venv is ours
LOG = VENV / 'mmsmart-setup.log'

OLDEST_FOR_MMSMART = (3, 10)  # as in setup.py
OLDEST, NEWEST = (3, 11), (3, 11)  # the Pythons that the pinned versions were tried with

# The requirement files of each part, in the order of their installation.
_DEMO = ['demo.txt', 'headless.txt', 'mmcv.txt']
FILES = {
    'lint': ['lint.txt'],
    'docs': ['lint.txt', 'docs.txt'],  # ruff breaks long signatures into lines
    'demo': _DEMO,
    'demo-seg': [*_DEMO, 'seg.txt'],
    'demo-det': [*_DEMO, 'det.txt'],
    'test': [*_DEMO, 'seg.txt', 'det.txt', 'test.txt'],
}
# A complete environment for the key is one for the values too.
IMPLIED = {
    'demo-seg': ['demo'],
    'demo-det': ['demo'],
    'test': ['demo', 'demo-seg', 'demo-det'],
    'docs': ['lint'],
}
ALONE = {'lint': 'the linter', 'docs': 'MkDocs'}  # parts that need neither torch nor mmsmart
ADDS = {'seg.txt': 'mmseg', 'det.txt': 'mmdet', 'test.txt': 'the test tools'}
WITH_OPS = {'demo-det', 'test'}  # mmcv's, which mmdet needs


def main() -> int:
    """Set up, then become the command."""
    parser = argparse.ArgumentParser(
        description='Set up what a part of the Makefile needs, then run a command with it.'
    )
    parser.add_argument('part', choices=list(FILES))
    parser.add_argument('command', nargs=argparse.REMAINDER, help='arguments for Python')
    arguments = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):  # leave as after Ctrl-C: ending what we started
        if signal.getsignal(number) != signal.SIG_IGN:  # unless run by nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        python, environment = set_up(arguments.part)
    except Failed as failure:
        say(f'\nSet-up of `make {arguments.part}` stopped.\n{failure}')
        return 1
    except KeyboardInterrupt:
        say('\nInterrupted. The next run goes on from here.')
        return 130
    if arguments.command:
        os.execve(python, [str(python), *arguments.command], environment)
    return 0


def set_up(part: str) -> tuple[Path, dict[str, str]]:
    """Return an interpreter that has what the part needs, and the variables to run it with."""
    if Path(sys.prefix).resolve() != VENV.resolve():
        present = existing.look_around(sys.executable)
        if present.is_ready_made:
            use_as_it_is(present, part)
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
            return Path(sys.executable), {**os.environ, 'PYTHONPATH': path}
    if not is_complete(part):
        with only_one_in(ROOT):
            if not is_complete(part):  # it may have become so while we waited
                complete(part)
    path = f'{VENV_PYTHON.parent}{os.pathsep}{os.environ["PATH"]}'
    return VENV_PYTHON, {**os.environ, 'VIRTUAL_ENV': str(VENV), 'PATH': path}


def use_as_it_is(environment: existing.Environment, part: str) -> None:
    """Say that this environment is used, or raise Failed with all that it lacks."""
    torch, mmengine = environment.versions['torch'], environment.versions['mmengine']
    has = f'torch {torch or "(version unknown)"} and mmengine {mmengine or "(version unknown)"}'
    say(f'* using the environment of {environment.python} as it is: it has {has}')
    lacking = existing.shortfalls(environment, part)
    if sys.version_info < OLDEST_FOR_MMSMART:
        lacking.append(
            f'Python {sysconfig.get_python_version()} is too old, 3.10 or later is needed'
        )
    if lacking:
        raise Failed(
            f'This environment has torch and MMEngine ({environment.family}), so nothing in it is\n'
            'changed for you. It lacks:\n'
            + ''.join(f'  {line}\n' for line in lacking)
            + 'Or have a separate .venv made: leave this environment (deactivate), or name a bare\n'
            f'Python with `make {part} PYTHON=...`.'
        )


# ------------------------------------------------------------------------------------------------
# .venv
# ------------------------------------------------------------------------------------------------


def read_state() -> dict:
    """What earlier runs have noted in .venv; empty if there is nothing, or nothing readable."""
    try:
        return json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}


def write_state(state: dict) -> None:
    """Note the state, whole or not at all."""
    draft = STATE.with_suffix('.draft')
    draft.write_text(json.dumps(state, indent=2))
    draft.replace(STATE)


def fingerprint(part: str) -> str:
    """Changes with everything that .venv is made from: pins, installer, Python, place."""
    digest = hashlib.sha256()
    files = [HERE / name for name in (*FILES[part], 'constraints.txt')]
    for file in (*files, *sorted(HERE.glob('*.py')), ROOT / 'setup.py'):
        digest.update(file.read_bytes())
    digest.update(f'{ROOT}\n{os.path.realpath(VENV_PYTHON)}'.encode())
    return digest.hexdigest()


def is_complete(part: str) -> bool:
    """Whether an earlier run has finished this part, and nothing has changed since."""
    return VENV_PYTHON.exists() and read_state().get(part) == fingerprint(part)


def complete(part: str) -> None:
    """Install what the part still lacks; the state says complete only after the last step."""
    begin = time.monotonic()
    if part in WITH_OPS and mmcv_ops.may_have_to_build(pinned('onedl-mmcv'), pinned('torch')):
        mmcv_ops.check_tools()  # now, rather than after minutes of downloading
    make_venv()
    state = read_state()
    finished = {name: state.pop(name) for name in FILES if name in state}
    write_state(state)  # until we are through, no part is known to be complete
    forget_half_installed()
    LOG.unlink(missing_ok=True)

    if part in ALONE:
        with step(f'installing {ALONE[part]}', '10 s'):
            for name in FILES[part]:
                pip_install('-r', HERE / name)
    else:
        with step('installing torch, MMEngine and mmpretrain into .venv', '2 min, 5 GB on Linux'):
            pip_install('-r', HERE / 'demo.txt')
            pip_install('-r', HERE / 'headless.txt')
        for name in FILES[part][len(_DEMO) :]:
            with step(f'installing {ADDS[name]}', '10 s'):
                pip_install('-r', HERE / name)
        install_mmcv(with_ops=part in WITH_OPS)
        with step('installing mmsmart itself, editable', '3 s'):
            pip_install('--no-deps', '--no-build-isolation', '--editable', ROOT)

    finished.update({name: fingerprint(name) for name in (part, *IMPLIED.get(part, []))})
    write_state({**read_state(), **finished})
    say(f'* .venv is ready for `make {part}` after {duration(time.monotonic() - begin)}\n')


def make_venv() -> None:
    """Make .venv, unless it is there, whole, ours and of a Python that still exists."""
    state = read_state()
    if VENV.exists() and not STATE.exists():
        raise Failed(
            f'{VENV} holds an environment that this set-up did not make, so it is left alone.\n'
            'Install the stack in it and name it with PYTHON=.venv/bin/python, or move it away.'
        )
    if VENV_PYTHON.exists() and state.get('python') == os.path.realpath(VENV_PYTHON):
        return
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise Failed(
            f'{sys.executable} is Python {sysconfig.get_python_version()}, and the pinned versions '
            f'are made for Python {OLDEST[0]}.{OLDEST[1]}.\n'
            'Install that and name it: make PYTHON=python3.11 ...\n'
            '  Debian, Ubuntu: apt install python3.11 python3.11-venv python3.11-dev\n'
            '  macOS: brew install python@3.11          conda: conda create -n py311 python=3.11'
        )
    base = getattr(sys, '_base_executable', sys.executable)  # not a venv that happens to be active
    with step(f'making .venv with Python {sysconfig.get_python_version()} ({base})', '5 s'):
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        write_state({})
        run(
            [base, '-m', 'venv', VENV],
            log=LOG,
            causes='On Debian and Ubuntu venv is a package of its own: apt install python3-venv',
        )
        write_state({'python': os.path.realpath(VENV_PYTHON)})


def forget_half_installed() -> None:
    """Make pip install again what it was installing when it was interrupted.

    pip takes a package for installed as soon as its METADATA is there, and writes INSTALLER last.
    """
    for folder in VENV.glob('lib/python3*/site-packages/*.dist-info'):
        if not (folder / 'INSTALLER').exists():
            shutil.rmtree(folder)


def pip(verb: str, *arguments: str | Path, log: Path = LOG) -> None:
    """Run .venv's pip, undisturbed by what is set for other Pythons, and show how far it is."""
    quiet = ['--no-input', '--disable-pip-version-check', '--progress-bar', 'off']
    run(
        [VENV_PYTHON, '-I', '-m', 'pip', verb, *quiet, *arguments],
        log=log,
        show=_progress,
        env={**os.environ, 'PIP_USER': '0'},
        causes='Likely causes: (a) no network, or a package index that lacks a pinned version; '
        '(b) the disk is full: .venv takes 5 GB; (c) no wheel for this platform.\n'
        'What is installed is kept; the next run goes on from there.',
    )


def pip_install(*arguments: str | Path) -> None:
    """Install with every version pinned."""
    pip('install', '-c', HERE / 'constraints.txt', *arguments)


def _progress(line: str) -> str | None:
    """Of what pip says, the parts that take long."""
    download = re.match(r'\s*Downloading ([^-/\s]+)-\S+ \((\d+)(\.\d+)? MB\)', line)
    if download and int(download[2]) >= 100:
        return f'downloading {download[1]} ({download[2]} MB)'
    packages = line.count(',') + 1
    if line.startswith('Installing collected packages:') and packages > 10:
        return f'unpacking {packages} packages'
    return None


def pinned(name: str) -> str:
    """The version that a requirement file pins."""
    text = ''.join(file.read_text() for file in HERE.glob('*.txt'))
    return re.search(rf'^{name}==([\w.]+)', text, re.MULTILINE)[1]


def install_mmcv(with_ops: bool) -> None:
    """Install mmcv with its compiled ops, or without them unless they are there already."""
    state = read_state()
    target = mmcv_ops.Target.of(VENV_PYTHON, mmcv=pinned('onedl-mmcv'))
    ops, pure = f'{target.mmcv} for {target.folder.name}', f'{target.mmcv} without ops'
    if state.get('mmcv') in ((ops,) if with_ops else (ops, pure)):
        return
    write_state({**state, 'mmcv': None})
    # pip's cache is kept out of this: it may hold a wheel of this name for another torch.
    options = ['--no-deps', '--force-reinstall', '--no-cache-dir']
    if with_ops:
        wheel = mmcv_ops.wheel(target, VENV_PYTHON, pip)
        with step('installing mmcv with its compiled ops', '15 s'):
            pip_install(*options, wheel)
            mmcv_ops.check_loads(VENV_PYTHON, wheel)
    else:
        with step('installing mmcv without its compiled ops', '10 s'):
            pip_install(*options, '--no-binary', 'onedl-mmcv', '-r', HERE / 'mmcv.txt')
    write_state({**state, 'mmcv': ops if with_ops else pure})


if __name__ == '__main__':
    sys.exit(main())
