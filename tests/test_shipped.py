"""Configs are found inside an installed package and beside a checkout."""

import pytest

from mmsmart.shipped import configs_folder


def base_file(folder):
    path = folder / 'configs/_base_/smart.py'
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_configs_of_an_installed_package_lie_inside_it(tmp_path, monkeypatch):
    monkeypatch.setattr('mmsmart.shipped.__file__', str(tmp_path / 'mmsmart/shipped.py'))
    installed = base_file(tmp_path / 'mmsmart/.mim')
    base_file(tmp_path)  # beside it, of something else
    assert configs_folder() == installed.parents[1]


def test_configs_of_a_checkout_lie_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr('mmsmart.shipped.__file__', str(tmp_path / 'mmsmart/shipped.py'))
    checkout = base_file(tmp_path)
    assert configs_folder() == checkout.parents[1]


def test_a_package_without_its_configs_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr('mmsmart.shipped.__file__', str(tmp_path / 'mmsmart/shipped.py'))
    with pytest.raises(FileNotFoundError, match='without its configs'):
        configs_folder()
