"""The configs of docs/prune-your-own.md train as they are shown.

On a few images, from a dense checkpoint of random weights; else nothing of them is changed but the
length of the segmentor's run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engine.runs import REPO, assert_finished, assert_on_budget, report, strictly_loaded

PAGE = (REPO / 'docs/prune-your-own.md').read_text()
EXAMPLES = dict(re.findall(r'^```python\n# (my_\w+)\.py\n(.*?)^```', PAGE, flags=re.M | re.S))


def read(path: Path) -> Any:
    from mmengine.config import Config

    from mmsmart.engine.stock_tools import enable_inheritance

    enable_inheritance()
    return Config.fromfile(path)


def train_as_shown(example: Path, dense: Path) -> None:
    import torch
    from mmengine.registry import MODELS, RUNNERS, init_default_scope

    from mmsmart.datasets import Digits
    from mmsmart.engine import pruning_hook

    pruning_hook.draw_report = lambda *args: None  # takes longer than the run
    pruning_hook.show_masks = lambda *args: None  # and so does this
    every_digit = Digits.load_data_list
    config, dense_config = read(example), read(dense)
    init_default_scope(config.default_scope)
    assert Path(config.load_from).parts[:2] == ('work_dirs', dense.stem)
    config.load_from = str(example.with_name('dense.pth'))
    torch.save({'state_dict': MODELS.build(dense_config.model).state_dict()}, config.load_from)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        data = loader.dataset.get('dataset', loader.dataset)  # YOLOX mixes several images
        if data.type == 'mmsmart.Digits':
            Digits.load_data_list = lambda self: every_digit(self)[:64]
        else:
            data.scenes = 8
    if 'max_iters' in config.train_cfg:
        config.train_cfg.update(max_iters=10, val_interval=10)
    config.work_dir = str(example.with_suffix(''))
    RUNNERS.build(config).train()


@pytest.mark.parametrize('name', EXAMPLES)
def test_a_config_of_the_page_prunes_as_it_stands(name, tmp_path):
    example = tmp_path / f'{name}.py'
    example.write_text(EXAMPLES[name].replace("'configs/", f"'{REPO}/configs/"))
    (base,) = re.findall(r"'configs/(.+?)'", EXAMPLES[name])
    dense = REPO / 'configs' / base
    if dense.parent.name == 'mmdet':
        pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    assert_finished(train_as_shown, example, dense, log=tmp_path / 'log.txt')
    assert_on_budget(tmp_path / name)
    figures = report(tmp_path / name)
    assert figures['target_sparsity'] == 0.7
    assert ('auxiliary_head.convs.0.conv' in {x['name'] for x in figures['excluded']}) == (
        'auxiliary_head' in EXAMPLES[name]
    )
    assert_finished(
        strictly_loaded_apart, dense, tmp_path / name / 'pruned.pth', log=tmp_path / 'strict.txt'
    )


def strictly_loaded_apart(dense: Path, weights: Path) -> None:
    from mmengine.registry import init_default_scope

    config = read(dense)
    init_default_scope(config.default_scope)
    strictly_loaded(dense, weights)


@pytest.mark.parametrize('name', EXAMPLES)
def test_a_config_of_the_page_ends_its_schedule_and_changes_no_image_in_the_search(name, tmp_path):
    from test_configs import (
        assert_augmentation_stays_during_the_search,
        assert_schedule_ends_with_the_run,
    )

    example = tmp_path / f'{name}.py'
    example.write_text(EXAMPLES[name].replace("'configs/", f"'{REPO}/configs/"))
    config = read(example)
    assert_schedule_ends_with_the_run(config)
    assert_augmentation_stays_during_the_search(config)


def test_the_page_has_a_config_for_each_task():
    assert list(EXAMPLES) == ['my_resnet_smart', 'my_yolox_smart', 'my_deeplab_smart']
    for name in EXAMPLES:
        assert f'work_dirs/{name}/pruned.pth' in PAGE
