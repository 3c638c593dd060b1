"""`python -m mmsmart` and what it is made of, on environments that are put together here."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmsmart import __version__, health
from mmsmart.shipped import configs_folder

ROOT = Path(__file__).parents[1]
TORCH = """
class cuda:
    device_count = lambda: {gpus}
    get_device_name = lambda index: 'H200'
class version:
    cuda = '13.0'
"""
FORKS = {
    'torch': ('torch', '2.11.0', TORCH.format(gpus=0)),
    'torchvision': ('torchvision', '0.26.0', ''),
    'mmengine': ('onedl-mmengine', '0.10.12', ''),
    'mmcv': ('onedl-mmcv', '2.3.6', ''),
    'mmcv._ext': (None, None, "get_compiling_cuda_version = lambda: 'not available'"),
    'mmpretrain': ('onedl-mmpretrain', '1.3.6', ''),
    'mmdet': ('onedl-mmdetection', '3.5.1', ''),
    'mmseg': ('onedl-mmsegmentation', '1.4.2', ''),
}
ORIGINALS = {
    **FORKS,
    'mmengine': ('mmengine', '0.10.7', ''),
    'mmcv': ('mmcv', '2.1.0', ''),
    'mmpretrain': ('mmpretrain', '1.2.0', ''),
    'mmdet': ('mmdet', '3.3.0', ''),
    'mmseg': ('mmsegmentation', '1.2.2', ''),
}


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Looks around in an environment that holds these packages and nothing else."""

    def look(packages, seconds=60.0):
        for module, (distribution, version, source) in packages.items():
            folder = tmp_path.joinpath(*module.split('.'))
            folder.mkdir()
            (folder / '__init__.py').write_text(source)
            if distribution:
                folder = f'{distribution.replace("-", "_")}-{version}.dist-info'
                metadata = tmp_path / folder / 'METADATA'
                metadata.parent.mkdir()
                metadata.write_text(
                    f'Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n'
                )
        monkeypatch.setenv('PYTHONPATH', str(tmp_path))
        return health.look_around(sys.executable, '-S', seconds=seconds)

    return look


def text(stack):
    return '\n'.join(health.report(stack))


@pytest.mark.parametrize('family', [FORKS, ORIGINALS], ids=['forks', 'originals'])
def test_a_whole_environment_is_ready_in_either_family(look, family):
    stack = look(family)
    assert stack.prunable == ['mmpretrain', 'mmdet', 'mmseg']
    for distribution, version, _ in filter(lambda item: item[0], family.values()):
        assert distribution in text(stack) and version in text(stack)
    assert ('onedl' in text(stack)) == (family is FORKS), 'one family is told of the other'


@pytest.mark.parametrize(
    ('family', 'module', 'left', 'cure'),
    [
        (FORKS, 'mmseg', ['mmpretrain', 'mmdet'], "pip install 'onedl-mmsegmentation>=1.4'"),
        (ORIGINALS, 'mmseg', ['mmpretrain', 'mmdet'], "pip install 'mmsegmentation>=1.2'"),
        (FORKS, 'mmcv._ext', ['mmpretrain', 'mmseg'], 'MMCV_WITH_OPS=1 python -m pip install'),
        (ORIGINALS, 'mmcv._ext', ['mmpretrain', 'mmseg'], "mim install 'mmcv>=2.0,<2.2'"),
        (FORKS, 'torchvision', ['mmdet', 'mmseg'], "'torchvision>=0.15' torch==2.11.0"),
        (FORKS, 'mmengine', [], "pip install 'onedl-mmengine>=0.10.8'"),
        (FORKS, 'torch', [], "pip install 'torch>=2.1'"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(look, family, module, left, cure):
    stack = look({name: family[name] for name in family if name != module})
    assert stack.prunable == left
    assert cure in text(stack)
    assert ('not ready' in text(stack)) == (not left)


def test_missing_extras_are_cured_by_one_command_and_keep_nothing_from_being_ready(look):
    stack = look(FORKS)
    assert len(stack.prunable) == 3
    (line,) = [line for line in text(stack).splitlines() if 'for what is optional' in line]
    assert "'torch-pruning>=1.6'" in line and "'onnx>=1.16'" in line


def test_a_package_that_is_too_old_can_not_be_used(look):
    stack = look({**FORKS, 'mmdet': ('onedl-mmdetection', '3.3.1', '')})
    assert stack.prunable == ['mmpretrain', 'mmseg']
    assert re.search(r'mmdet +3\.3\.1 +too old, 3\.5 or later is needed', text(stack))


@pytest.mark.parametrize(
    ('source', 'said'),
    [
        ("assert False, 'MMCV==2.3 is used but incompatible'", 'is used but incompatible'),
        ("raise ImportError('undefined symbol: _ZN3c10')", 'ImportError: undefined symbol'),
        ('raise SystemExit(3)', 'SystemExit: 3'),
        ('import os; os.kill(os.getpid(), 11)', 'crashes Python (exit status -11)'),
    ],
)
def test_a_package_that_does_not_load_is_named_with_its_reason(look, source, said):
    stack = look({**FORKS, 'mmseg': (*FORKS['mmseg'][:2], source)})
    assert stack.prunable == ['mmpretrain', 'mmdet']
    (line,) = [line for line in text(stack).splitlines() if line.startswith('mmseg')]
    assert said in line


def test_an_mmcv_that_mmdet_refuses_is_what_is_cured(look):
    refuses = "assert False, 'MMCV==2.2.0 is used but incompatible. Install mmcv>=2.0, <2.2'"
    said = text(look({**ORIGINALS, 'mmdet': ('mmdet', '3.3.0', refuses)}))
    assert "mim install 'mmcv>=2.0,<2.2'" in said
    assert 'pip install mmdet' not in said and "'mmdet>=" not in said


def test_an_import_that_hangs_is_named_and_what_comes_after_it_is_not_blamed(look):
    hangs = (*FORKS['mmpretrain'][:2], 'import time; time.sleep(600)')
    stack = look({**FORKS, 'mmpretrain': hangs}, seconds=2)
    assert stack.error('mmpretrain') == 'does not finish loading in 2 s'
    assert stack.error('mmdet').startswith('not tried: mmpretrain does not finish')
    assert stack.error('mmcv') is None


def test_both_families_at_once_are_reported(look):
    both = {**FORKS, 'mmcv.other': ('mmcv', '2.1.0', '')}
    assert 'overwrite each other' in look(both).family


def test_ops_without_cuda_are_reported_where_a_gpu_is_in_sight(look):
    said = text(look({**FORKS, 'torch': ('torch', '2.11.0', TORCH.format(gpus=1))}))
    assert 'CUDA 13.0, 1 x H200' in said
    assert 'detectors will fail on the GPU' in said
    assert 'FORCE_CUDA=1 MMCV_WITH_OPS=1 python -m pip install' in said


def test_least_versions_are_those_of_the_installer():
    spec = importlib.util.spec_from_file_location('existing', ROOT / 'requirements/existing.py')
    existing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(existing)
    for part in health.PARTS:
        assert part[:5] == tuple(existing.NEEDS[part.module]), part.module


def test_the_command_prints_version_base_file_and_this_environment():
    done = subprocess.run(
        [sys.executable, '-m', 'mmsmart'],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONWARNINGS': 'ignore'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version, base, empty, *rest = done.stdout.splitlines()
    assert version == f'mmsmart {__version__}'
    assert base == f'base file: {configs_folder() / "_base_" / "smart.py"}'
    assert not empty and any(line.startswith('ready to prune: mmpretrain') for line in rest)


def test_it_speaks_where_torch_is_missing(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ModuleNotFoundError("No module named torch")')
    environment = {**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'}
    done = subprocess.run(
        [sys.executable, '-m', 'mmsmart'], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'torch' in done.stdout and 'pip install' in done.stdout
