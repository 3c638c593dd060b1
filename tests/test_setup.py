# Copyright (c) mmsmart contributors.
"""Set-up and packaging as a newcomer meets them: running the installer, building a wheel.

Nothing here reaches a network or changes the environment that the tests run in.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FORKS = {
    'torch': '2.11.0',
    'torchvision': '0.26.0',
    'mmengine': ('onedl-mmengine', '0.10.12'),
    'mmcv': ('onedl-mmcv', '2.3.6'),
    'mmpretrain': ('onedl-mmpretrain', '1.3.6'),
    'mmdet': ('onedl-mmdetection', '3.5.1'),
    'mmseg': ('onedl-mmsegmentation', '1.4.2'),
    'numpy': '2.2.6',
    'matplotlib': '3.11.2',
    'sklearn': ('scikit-learn', '1.9.1'),
    'torch_pruning': ('torch-pruning', '1.6.1'),
    'pytest': '9.2.0',
    'hypothesis': '6.170.15',
    'onnx': '1.23.2',
    'onnxruntime': '1.32.0',
    'onnxscript': '0.7.2',
    'safetensors': '0.8.0',
}
ORIGINALS = {
    **FORKS,
    'torch': '2.1.0',
    'torchvision': '0.16.0',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmpretrain': '1.2.0',
    'mmdet': '3.3.0',
    'mmseg': ('mmsegmentation', '1.2.2'),
}


def copy_of_the_project(folder):
    """A copy of what set-up and packaging read, as in a fresh clone."""
    names = ['LICENSE', 'MANIFEST.in', 'README.md', 'model-index.yml', 'pyproject.toml', 'setup.py']
    names += ['configs', 'mmsmart', 'requirements', 'tools']
    folder.mkdir(exist_ok=True)
    for name in names:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns('__pycache__', '.mim')
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name)
    return folder


# ------------------------------------------------------------------------------------------------
# An environment that is there already
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path):
    """Runs the installer in a copy of the project, seeing only the packages it is told of."""
    project = copy_of_the_project(tmp_path / 'project')

    def run(part, packages, *command, mmcv_ops=True):
        site = tmp_path / 'site'
        for module, distribution in packages.items():
            name, version = (
                (module, distribution) if isinstance(distribution, str) else distribution
            )
            (site / module).mkdir(parents=True)
            (site / module / '__init__.py').write_text(
                'raise AssertionError("must not be imported")'
            )
            metadata = site / f'{name.replace("-", "_")}-{version}.dist-info' / 'METADATA'
            metadata.parent.mkdir()
            metadata.write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        if mmcv_ops and 'mmcv' in packages:
            (site / 'mmcv' / '_ext.cpython-311-x86_64-linux-gnu.so').touch()
        before = sorted(site.rglob('*'))
        result = subprocess.run(
            # -S: without the packages of the environment that the tests run in
            [sys.executable, '-S', 'requirements/install.py', part, *command],
            cwd=project,
            env={**os.environ, 'PYTHONPATH': str(site), 'PYTHONDONTWRITEBYTECODE': '1'},
            capture_output=True,
            text=True,
        )
        assert sorted(site.rglob('*')) == before, 'the installer changed an existing environment'
        assert not (project / '.venv').exists(), 'the installer made a .venv beside an existing one'
        return result

    return run


@pytest.mark.parametrize('family', [FORKS, ORIGINALS], ids=['forks', 'originals'])
@pytest.mark.parametrize('part', ['demo', 'demo-seg', 'demo-det', 'test'])
def test_an_environment_with_all_that_is_needed_is_used_as_it_is(install, family, part):
    result = install(part, family, '-S', '-c', 'import sys; print(sys.executable, sys.path)')

    assert result.returncode == 0, result.stderr
    executable, path = result.stdout.split(maxsplit=1)
    assert executable == sys.executable
    assert 'project' in path, 'the project itself must be importable without being installed'


@pytest.mark.parametrize(
    ('family', 'module', 'cure'),
    [
        (FORKS, 'mmpretrain', "pip install 'onedl-mmpretrain>=1.3'"),
        (FORKS, 'mmdet', "pip install 'onedl-mmdetection>=3.5'"),
        (FORKS, 'torchvision', "pip install 'torchvision>=0.15' torch==2.11.0"),
        (FORKS, 'mmcv', 'MMCV_WITH_OPS=1'),
        (ORIGINALS, 'mmpretrain', "pip install 'mmpretrain>=1.2'"),
        (ORIGINALS, 'mmseg', "pip install 'mmsegmentation>=1.2'"),
        (ORIGINALS, 'mmcv', "mim install 'mmcv>=2.0,<2.2'"),
        (ORIGINALS, 'pytest', "pip install 'pytest>=7.4'"),
    ],
)
def test_a_missing_part_is_named_with_the_cure_of_the_family_that_is_there(
    install, family, module, cure
):
    result = install('test', {name: family[name] for name in family if name != module})

    assert result.returncode == 1
    assert 'not installed' in result.stderr
    assert cure in result.stderr
    assert ('onedl' in result.stderr) == (family is FORKS), 'one family is told of the other'


def test_a_part_that_is_too_old_is_named_with_its_cure(install):
    result = install('demo', {**ORIGINALS, 'torch': '1.13.1+cu117', 'mmpretrain': '1.0.0'})

    assert result.returncode == 1
    assert 'torch: 1.13.1+cu117 is too old, 2.1 or later is needed' in result.stderr
    assert 'mmpretrain: 1.0.0 is too old, 1.2 or later is needed' in result.stderr
    assert f"{sys.executable} -m pip install 'mmpretrain>=1.2'" in result.stderr


@pytest.mark.parametrize(
    ('part', 'others'), [('demo', {'mmdet', 'mmseg'}), ('demo-seg', {'mmdet'})]
)
def test_demos_without_detectors_need_neither_mmdet_nor_the_compiled_ops_of_mmcv(
    install, part, others
):
    packages = {name: FORKS[name] for name in FORKS if name not in others}
    assert install(part, packages, mmcv_ops=False).returncode == 0


@pytest.mark.parametrize(('part', 'module'), [('demo-seg', 'mmseg'), ('demo-det', 'mmdet')])
def test_a_demo_without_its_models_names_what_they_come_in(install, part, module):
    result = install(part, {name: FORKS[name] for name in FORKS if name != module})

    assert result.returncode == 1
    assert f'{FORKS[module][0]}: not installed' in result.stderr


@pytest.mark.parametrize('part', ['test', 'demo-det'])
def test_missing_compiled_ops_are_named(install, part):
    result = install(part, FORKS, mmcv_ops=False)

    assert result.returncode == 1
    assert 'mmcv._ext' in result.stderr
    assert 'MMCV_WITH_OPS=1' in result.stderr


# ------------------------------------------------------------------------------------------------
# The environment that is made
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """The installer's modules, those of a copy so that .venv is one too."""
    project = copy_of_the_project(tmp_path / 'project')
    for module in ('install', 'existing', 'mmcv_ops', 'steps'):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(project / 'requirements')
    import install

    yield install
    for module in ('install', 'existing', 'mmcv_ops', 'steps'):
        sys.modules.pop(module, None)


@pytest.fixture
def venv(installer):
    """A .venv as the installer makes it, of links instead of an interpreter."""
    installer.VENV_PYTHON.parent.mkdir(parents=True)
    installer.VENV_PYTHON.symlink_to(sys.executable)
    installer.write_state({'python': os.path.realpath(sys.executable)})
    return installer


def test_an_interrupted_install_is_not_taken_for_complete(venv, monkeypatch):
    finished = {part: venv.fingerprint(part) for part in venv.FILES}
    venv.write_state({**venv.read_state(), **finished})
    assert all(map(venv.is_complete, venv.FILES))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(venv, 'run', interrupted)
    with pytest.raises(KeyboardInterrupt):
        venv.complete('lint')

    assert not any(map(venv.is_complete, venv.FILES))


def test_a_finished_part_leaves_the_others_complete(venv, monkeypatch):
    venv.write_state({**venv.read_state(), 'demo': venv.fingerprint('demo')})
    monkeypatch.setattr(venv, 'run', lambda *arguments, **options: None)

    venv.complete('lint')

    assert venv.is_complete('demo')
    assert venv.is_complete('lint')
    assert not venv.is_complete('test')


def test_an_environment_for_the_tests_is_one_for_every_demo(venv, monkeypatch):
    monkeypatch.setattr(venv, 'run', lambda *arguments, **options: None)
    monkeypatch.setattr(venv, 'install_mmcv', lambda with_ops: None)
    monkeypatch.setattr(venv.mmcv_ops, 'check_tools', lambda: None)

    venv.complete('demo-seg')
    assert [part for part in venv.FILES if venv.is_complete(part)] == ['demo', 'demo-seg']
    venv.complete('test')
    assert set(filter(venv.is_complete, venv.FILES)) == set(venv.FILES) - {'lint', 'docs'}


@pytest.mark.parametrize(
    ('part', 'expected'), [('demo', False), ('demo-seg', False), ('demo-det', True), ('test', True)]
)
def test_mmcv_comes_with_its_ops_where_detectors_are_used(venv, monkeypatch, part, expected):
    asked = []
    monkeypatch.setattr(venv, 'run', lambda *arguments, **options: None)
    monkeypatch.setattr(venv, 'install_mmcv', lambda with_ops: asked.append(with_ops))
    monkeypatch.setattr(venv.mmcv_ops, 'check_tools', lambda: None)

    venv.complete(part)

    assert asked == [expected]


@pytest.mark.parametrize('file', ['requirements/demo.txt', 'requirements/constraints.txt'])
def test_a_changed_pin_makes_the_environment_incomplete(venv, file):
    venv.write_state({**venv.read_state(), 'demo': venv.fingerprint('demo')})
    with open(venv.ROOT / file, 'a') as pins:
        pins.write('another==1.0\n')

    assert not venv.is_complete('demo')


def test_a_package_that_pip_was_interrupted_in_is_installed_again(venv):
    site = venv.VENV / 'lib/python3.11/site-packages'
    for name, files in {'whole': ['METADATA', 'INSTALLER'], 'half': ['METADATA']}.items():
        (site / f'{name}-1.0.dist-info').mkdir(parents=True)
        for file in files:
            (site / f'{name}-1.0.dist-info' / file).touch()

    venv.forget_half_installed()

    assert [folder.name for folder in site.iterdir()] == ['whole-1.0.dist-info']


def test_a_venv_of_somebody_else_is_left_alone(installer):
    installer.VENV.mkdir()
    (installer.VENV / 'precious').touch()

    with pytest.raises(installer.Failed, match='did not make'):
        installer.make_venv()

    assert (installer.VENV / 'precious').exists()


def test_a_python_that_the_pins_do_not_fit_is_named_with_the_one_that_does(installer, monkeypatch):
    monkeypatch.setattr(installer.sys, 'version_info', (3, 9, 18))

    with pytest.raises(installer.Failed, match=r'made for Python 3\.11') as failure:
        installer.make_venv()

    assert 'make PYTHON=python3.11' in str(failure.value)
    assert not installer.VENV.exists()


# ------------------------------------------------------------------------------------------------
# mmcv's compiled ops
# ------------------------------------------------------------------------------------------------


def test_the_cached_wheel_is_one_for_each_python_torch_and_platform(installer, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
    target = installer.mmcv_ops.Target('2.3.6', 'cp311', '2.11.0', 'linux_x86_64')
    others = [
        target._replace(python='cp312'),
        target._replace(torch='2.11.0+cpu'),
        target._replace(platform='linux_aarch64'),
    ]

    folder = '/cache/mmsmart/wheels/cp311-torch2.11.0-linux_x86_64'
    assert str(target.folder) == folder
    assert len({other.folder for other in [target, *others]}) == 4


@pytest.fixture
def build(installer, tmp_path, monkeypatch):
    """Builds mmcv from a source of three lines instead of the published one."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    target = installer.mmcv_ops.Target('2.3.6', 'cp311', '2.11.0', 'linux_x86_64')
    downloads = []

    def build(script):
        def pip(verb, *arguments, log):
            downloads.append(verb)
            folder = Path(arguments[arguments.index('--dest') + 1])
            source = tmp_path / 'onedl_mmcv-2.3.6'
            source.mkdir()
            (source / 'setup.py').write_text(script)
            with tarfile.open(folder / 'onedl_mmcv-2.3.6.tar.gz', 'w:gz') as archive:
                archive.add(source, source.name)

        return installer.mmcv_ops.wheel(target, Path(sys.executable), pip)

    build.target, build.downloads, build.failed = target, downloads, installer.Failed
    return build


FINISHES = """
import sys, zipfile
print('[78/78] c++')
with zipfile.ZipFile(sys.argv[-1] + '/onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl', 'w') as wheel:
    wheel.writestr('mmcv/_ext.so', '')
"""
FAILS_ONCE = f"""
import os, sys
if not os.path.exists('object.o'):
    open('object.o', 'w')
    sys.exit('error: out of memory')
{FINISHES}
"""


def test_the_ops_are_built_once(build):
    first = build(FINISHES)
    assert build(FINISHES) == first
    assert build.downloads == ['download']


def test_a_failed_build_says_why_and_where_and_the_next_goes_on_from_there(build):
    with pytest.raises(build.failed, match='out of memory') as failure:
        build(FAILS_ONCE)
    assert 'build.log' in str(failure.value)
    assert 'MAX_JOBS=1' in str(failure.value)
    assert build.target.cached_wheel() is None

    assert build(FAILS_ONCE) == build.target.cached_wheel()
    assert build.downloads == ['download'], 'the source was unpacked twice, its objects lost'


def test_a_wheel_without_the_compiled_ops_is_not_kept(build):
    with pytest.raises(build.failed, match='without its compiled ops'):
        build(FINISHES.replace('mmcv/_ext.so', 'mmcv/__init__.py'))
    assert build.target.cached_wheel() is None


def test_a_missing_compiler_is_named_with_the_way_to_get_it(installer, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')

    with pytest.raises(installer.Failed, match=r'no C\+\+ compiler') as failure:
        installer.mmcv_ops.check_tools()

    assert 'apt install g++' in str(failure.value)


def test_missing_headers_of_python_are_named_with_the_way_to_get_them(installer, monkeypatch):
    monkeypatch.setenv('CXX', sys.executable)  # anything that is there
    monkeypatch.setattr(installer.sysconfig, 'get_path', lambda name: '/nowhere')

    with pytest.raises(installer.Failed, match=r'Python\.h') as failure:
        installer.mmcv_ops.check_tools()

    assert '-dev' in str(failure.value)


# ------------------------------------------------------------------------------------------------
# The wheel
# ------------------------------------------------------------------------------------------------


def build_package(kind, project, into):
    """Calls the build backend as pip does, in this environment."""
    pytest.importorskip('setuptools', '70.1', reason='older ones cannot build wheels alone')
    code = f'from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))'
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=project, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return into / result.stdout.split()[-1]


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    """A wheel from the tree, a source distribution, and a wheel from that."""
    tree = copy_of_the_project(tmp_path_factory.mktemp('tree'))
    out = tmp_path_factory.mktemp('packages')
    sdist = build_package('sdist', tree, out)
    left = {path.name for path in tree.iterdir()} - {path.name for path in ROOT.iterdir()}
    assert left <= {'mmsmart.egg-info', 'build', 'dist'}
    assert not (tree / 'mmsmart' / '.mim').exists(), 'the build left copies in the source tree'

    unpacked = tmp_path_factory.mktemp('unpacked')
    shutil.unpack_archive(sdist, unpacked)
    again = tmp_path_factory.mktemp('again')
    return {
        'from the tree': build_package('wheel', tree, out),
        'from the sdist': build_package('wheel', next(unpacked.iterdir()), again),
    }


@pytest.mark.parametrize('origin', ['from the tree', 'from the sdist'])
def test_the_wheel_ships_configs_and_tools_where_openmmlab_looks(packages, origin):
    with zipfile.ZipFile(packages[origin]) as wheel:
        shipped = set(wheel.namelist())

    for folder in ('configs', 'tools'):
        files = [path for path in (ROOT / folder).rglob('*') if path.is_file()]
        files = [path for path in files if '__pycache__' not in path.parts]
        assert files
        missing = {f'mmsmart/.mim/{path.relative_to(ROOT).as_posix()}' for path in files} - shipped
        assert not missing
    assert 'mmsmart/functional/__init__.py' in shipped
    assert not [name for name in shipped if name.startswith(('tests/', 'requirements/'))]


@pytest.fixture(scope='module')
def requirements(packages):
    """What the wheel requires: for each extra, and for none, the version specifiers by name."""
    with zipfile.ZipFile(packages['from the tree']) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = message_from_bytes(wheel.read(name))
    by_extra = {'': {}}
    for requirement in map(Requirement, metadata.get_all('Requires-Dist')):
        for extra in ['', *metadata.get_all('Provides-Extra')]:
            if requirement.marker is None or requirement.marker.evaluate({'extra': extra}):
                by_extra.setdefault(extra, {})[requirement.name] = requirement.specifier
    return by_extra


def test_the_wheel_requires_neither_family_and_each_extra_one_of_them(requirements):
    assert set(requirements['']) == {'torch', 'numpy'}
    assert sum(name.startswith('onedl-') for name in requirements['onedl']) == 5
    assert not any(name.startswith('onedl-') for name in requirements['openmmlab'])


def test_the_extras_ask_for_the_versions_that_the_installer_asks_for(requirements, installer):
    asked = {name: str(asks) for extra in requirements.values() for name, asks in extra.items()}
    for need in installer.existing.NEEDS.values():
        for name, least in [(need.original, need.least), (need.fork, need.fork_least)]:
            assert f'>={least}' in asked.get(name, f'>={least}'), name
    assert {'onedl-mmcv', 'mmcv', 'torch', 'torchvision', 'pytest'} <= set(asked)


def test_an_editable_install_links_to_the_originals(tmp_path):
    project = copy_of_the_project(tmp_path / 'project')
    build_package('editable', project, tmp_path)

    for name in ('configs', 'tools'):
        link = project / 'mmsmart' / '.mim' / name
        assert link.is_symlink()
        assert link.resolve() == project / name


# ------------------------------------------------------------------------------------------------
# What goes wrong without anybody noticing
# ------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned():
    for file in (ROOT / 'requirements').glob('*.txt'):
        lines = [line.split('#')[0].strip() for line in file.read_text().splitlines()]
        loose = [line for line in lines if line and '==' not in line]
        assert not loose, f'{file.name}: {loose}'


def test_state_that_cannot_be_read_counts_as_none(venv):
    venv.STATE.write_text(json.dumps({'demo': 'x'})[:5])
    assert not venv.is_complete('demo')
