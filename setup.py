# Copyright (c) mmsmart contributors.
"""Packaging: the dependencies, and configs and tools inside the package as `mmsmart/.mim`."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHIPPED = ['configs', 'tools', 'model-index.yml']


class BuildWithMim(build_py):
    """Put configs and tools where MIM, and `_base_ = 'package::...'`, look for them.

    An editable install has links to the originals; a wheel has copies, made in the build folder so
    that nothing but the ignored links is ever left in the source tree.
    """

    def run(self):
        super().run()
        present = [HERE / name for name in SHIPPED if (HERE / name).exists()]
        if self.editable_mode:
            _link(present, HERE / 'mmsmart' / '.mim')
        else:
            _copy(present, Path(self.build_lib) / 'mmsmart' / '.mim')


def _link(originals, mim):
    _make_empty(mim)
    for original in originals:
        (mim / original.name).symlink_to(os.path.relpath(original, mim))


def _copy(originals, mim):
    _make_empty(mim)
    for original in originals:
        if original.is_dir():
            unwanted = shutil.ignore_patterns('__pycache__', '*.py[cod]')
            shutil.copytree(original, mim / original.name, ignore=unwanted)
        else:
            shutil.copy2(original, mim / original.name)


def _make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier build left; links are not followed
    folder.mkdir(parents=True)


def version():
    """Read the version without importing the package, which would import torch."""
    text = (HERE / 'mmsmart' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"__version__ = '(.+)'", text)[1]


def readme():
    """The long description, as far as there is one."""
    file = HERE / 'README.md'
    return file.read_text(encoding='utf-8') if file.exists() else ''


setup(
    name='mmsmart',
    version=version(),
    description='Prunes blocks of weights of OpenMMLab models to an exact budget, by config',
    long_description=readme(),
    long_description_content_type='text/markdown',
    author='mmsmart contributors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='pruning sparsity compression computer-vision openmmlab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmsmart', 'mmsmart.*']),
    include_package_data=False,
    package_data={'mmsmart.executor': ['kernel.cpp'], 'mmsmart.html_report': ['page.html']},
    python_requires='>=3.10',
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
    # Only what pruning itself needs. OpenMMLab's packages are left out on purpose: they exist in
    # two families with the same import names, and requiring one would install it over the other.
    install_requires=[
        'torch>=2.1',  # the oldest that was tried
        'numpy>=1.23',  # the first for Python 3.11
    ],
    # `pip install mmsmart[onedl]` or `mmsmart[openmmlab]`: naming the extra is choosing the family.
    # Never both in one environment, and neither where OpenMMLab is installed already.
    # Lower bounds: of the originals the last minor release, of a fork the first that was tried.
    extras_require={
        'onedl': [  # the maintained forks; detection also wants onedl-mmcv built with its ops
            'onedl-mmengine>=0.10.8',
            'onedl-mmcv>=2.3',
            'onedl-mmpretrain>=1.3',
            'onedl-mmdetection>=3.5',
            'onedl-mmsegmentation>=1.4',
            'torchvision>=0.15',  # mmpretrain imports it without requiring it
        ],
        'openmmlab': [  # the originals; mmdet and mmseg refuse mmcv 2.2
            'mmengine>=0.10',
            'mmcv>=2.0,<2.2',
            'mmpretrain>=1.2',
            'mmdet>=3.3',
            'mmsegmentation>=1.2',
            'torchvision>=0.15',
        ],
        'channel': ['torch-pruning>=1.6'],  # finds the channels that have to be cut together
        'export': [  # ONNX through torch's exporter wants torch 2.6; these are of its time or older
            'onnx>=1.16',
            'onnxruntime>=1.20',
            'onnxscript>=0.2',
            'safetensors>=0.4',  # the packed-blocks file
        ],
        'executor': ['ninja>=1.10'],  # compiles its kernel, together with a C++ compiler
        'tests': ['pytest>=7.4', 'hypothesis>=6.80', 'ruff>=0.17'],
    },
)
