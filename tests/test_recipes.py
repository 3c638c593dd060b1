"""The recipes can be followed: every command line in them is one that its tool would take."""

from __future__ import annotations

import argparse
import functools
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
from mmengine.config import Config
from test_configs import (
    CONFIGS,
    assert_augmentation_stays_during_the_search,
    assert_schedule_ends_with_the_run,
    index_entry,
    mim,
    read,
    upstream,
)

from mmsmart.engine.config import Smart, build

REPO = Path(__file__).parents[1]
RECIPES = sorted(REPO.glob('docs/recipes/*.md'))
DISTRIBUTIONS = {
    'mmpretrain': 'onedl-mmpretrain',
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
}
SETTING = re.compile(r'([A-Z_]+)=(\S*)')


@functools.cache
def commands(page: Path) -> list[list[str]]:
    """Words of every command of a page, with the shell variables that it sets put in."""
    found, variables = [], {}
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    blocks = re.findall(r'^```shell\n(.*?)^```', page.read_text(), flags=re.M | re.S)
    for line in ''.join(blocks).replace('\\\n', ' ').splitlines():
        if assigned := re.fullmatch(r'([A-Z]+)=(\S+|\$\(.+\)\S*)', line):
            script = f'{line}; printf %s "${assigned[1]}"'
            done = subprocess.run(
                ['bash', '-c', script],
                capture_output=True,
                text=True,
                env={**os.environ, 'PATH': path},
            )
            assert done.returncode == 0, done.stderr
            variables[assigned[1]] = done.stdout
        else:
            found.append(shlex.split(Template(line).substitute(variables)))
    return found


def without_settings(words: list[str]) -> list[str]:
    """The command after what it sets in its environment, which is for tools/dist_train.sh."""
    settings = [SETTING.fullmatch(word) for word in words]
    first = settings.index(None)
    script = (REPO / 'tools/dist_train.sh').read_text()
    assert all(f'${{{setting[1]}:-' in script for setting in settings[:first])
    return words[first:]


def training_commands(page: Path) -> Iterator[tuple[Path, list[str]]]:
    """Config and the arguments after it of every training on several GPUs."""
    for words in map(without_settings, commands(page)):
        if words[:2] == ['bash', 'tools/dist_train.sh']:
            assert int(words[3]) > 0
            yield REPO / words[2], [*words[4:], '--launcher', 'pytorch']


def parsed(tool: Path, *words: str) -> argparse.Namespace:
    """Arguments as the tool itself understands them; it exits at one that it does not know."""
    if 'mmdet' in tool.parts:
        pytest.importorskip('mmcv._ext', reason="mmdet needs mmcv's ops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LOCAL_RANK', '0')
        patch.setattr(sys, 'argv', [str(tool), *map(str, words)])
        return runpy.run_path(str(tool))['parse_args']()


def trainings(page: Path) -> Iterator[tuple[Path, argparse.Namespace, Config]]:
    """Config file, arguments, and the config that they make, of every training command."""
    for path, words in training_commands(page):
        args = parsed(mim(path.parent.name) / 'tools/train.py', path, *words)
        config = read(path)
        for key in args.cfg_options:
            assert_has(config, key)
        config.merge_from_dict(args.cfg_options)
        yield path, args, config


def assert_has(config: Config, key: str) -> None:
    """MMEngine takes any key for a new one, so a misspelt option would do nothing."""
    for part in key.split('.'):
        assert part.isdigit() or part in config, f'{key} is not in the config'
        config = config[int(part) if part.isdigit() else part]


def downloads(page: Path) -> dict[str, str]:
    """Checkpoints that a page fetches, and their names in upstream's model index."""
    entries = {}
    for path in dict(training_commands(page)):
        scope, base = upstream(path)
        entry = index_entry(scope, base)
        entries[DISTRIBUTIONS[scope], entry['Name']] = Path(entry['Weights']).name
    fetched = {}
    for words in commands(page):
        if words[:2] == ['mim', 'download']:
            package, option, name, other, folder = words[2:]
            assert (option, other) == ('--config', '--dest')
            fetched[f'{folder}/{entries[package, name]}'] = name
    return fetched


def test_there_is_a_recipe_for_each_task():
    assert [page.stem for page in RECIPES] == ['cityscapes', 'coco', 'imagenet']
    assert all('were not run for this project' in page.read_text() for page in RECIPES)


@pytest.mark.parametrize('page', RECIPES, ids=lambda page: page.name)
def test_a_recipe_uses_tools_that_exist(page):
    for words in map(without_settings, commands(page)):
        assert words[0] in {'bash', 'python', 'mim'}
        assert words[0] == 'mim' or (REPO / words[1]).is_file()


@pytest.mark.parametrize('page', RECIPES, ids=lambda page: page.name)
def test_a_recipe_names_configs_that_exist(page):
    known = {path.name for path in CONFIGS}
    names = set(re.findall(r'([\w.-]+_smart\.py)', page.read_text()))
    assert names and names <= known


@pytest.mark.parametrize('page', RECIPES, ids=lambda page: page.name)
def test_a_recipe_trains_what_it_says(page):
    fetched, runs = downloads(page), 0
    for path, args, config in trainings(page):
        assert args.work_dir
        name = fetched[config.load_from]
        assert index_entry(*upstream(path))['Name'] == name
        smart = build(Smart, 'smart', config.smart.to_dict())
        smart.model_args(), smart.hook_args(), smart.optimizer_args()
        assert_schedule_ends_with_the_run(config)
        assert_augmentation_stays_during_the_search(config)
        runs += 1
    assert runs >= 3


@pytest.mark.parametrize('page', RECIPES, ids=lambda page: page.name)
def test_a_recipe_scores_with_the_stock_tool_and_config(page):
    trained = {args.work_dir: upstream(path) for path, args, _ in trainings(page)}
    tests = [words for words in commands(page) if words[1].endswith('/test.py')]
    assert tests
    for words in tests:
        args = parsed(Path(words[1]), *words[2:])
        folder, file = args.checkpoint.rsplit('/', 1)
        scope, base = trained[folder]
        assert Path(args.config) == mim(scope) / 'configs' / base and Path(args.config).is_file()
        assert Path(words[1]) == mim(scope) / 'tools/test.py'
        assert file == 'pruned.pth'


@pytest.mark.parametrize('page', RECIPES, ids=lambda page: page.name)
def test_options_that_a_recipe_mentions_are_in_its_configs(page):
    configs = [read(path) for path in dict(training_commands(page))]
    prefixes = r'smart|train_cfg|optim_wrapper|param_scheduler|train_dataloader|model'
    for key in re.findall(rf'`((?:{prefixes})(?:\.\w+)+)(?:=[^`]*)?`', page.read_text()):
        for config in configs:
            try:
                assert_has(config, key)
                break
            except AssertionError:
                continue
        else:
            pytest.fail(f'{page.name}: {key} is in none of its configs')
