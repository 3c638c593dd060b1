"""Pages of runs in every state: what is there is drawn, what is missing is said."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from mmsmart.html_report.page import write_report
from mmsmart.html_report.run import (
    Importances,
    Layer,
    Run,
    Start,
    Timeline,
    main_metric,
    short,
)


def a_layer(name, out, in_, kept=0.25):
    image = (np.arange(out * in_).reshape(out, in_) % 4 == 0).astype(float)
    params = out * in_ * 16
    macs = 9 * params
    return Layer(name, (out * 4, in_ * 4), params, kept * params, macs, kept * macs, image)


def a_run(name='run', **changes):
    """A finished run of 100 iterations."""
    train = [{'iter': i, 'loss': 1 / i} for i in range(10, 101, 10)]
    for row in train[2:6]:
        row.update(temperature=30 / row['iter'], undecided=1 - row['iter'] / 100, moved=0.1)
    distance = np.linspace(-2, 2, 400)
    run = Run(
        name,
        f'work_dirs/{name}',
        finished=True,
        iteration=100,
        timeline=Timeline(20, 60, 100),
        starts=[Start('2026-11-23 10:45:00', 0, 'python tools/train.py c.py', {'torch': '2.11'})],
        train=train,
        validation=[(20, {'mIoU': 71.5}), (100, {'mIoU': 70.25})],
        budgets=[
            dict(part='', resource='params', target_sparsity=0.75, total=4000.0, budget=1000.0,
                 kept=995.0, next_block_cost=16.0)
        ],
        dense={'params': 4000, 'macs': 36000, 'mIoU': 71.5},
        pruned={'params': 1000, 'macs': 9000, 'mIoU': 70.25},
        layers=[a_layer('backbone.a', 4, 8), a_layer('backbone.b', 8, 8), a_layer('head', 2, 8)],
        masks_from='pruned.pth',
        importances=Importances(distance, distance > 0),
        excluded=[('stem', 'depthwise'), ('neck', 'depthwise'), ('fc', 'frozen')],
        config='model = dict(type="<Model> & more")',
    )  # fmt: skip
    return replace(run, **changes)


def texts(page, section):
    """The words of a section, without tags."""
    body = re.search(f'<section id="{section}">(.*?)</section>', page.read_text(), flags=re.S)[1]
    return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', body))


@pytest.fixture(scope='module', autouse=True)
def small_pictures():
    """Fewer pixels, which are drawn faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmsmart.html_report.page._DPI', 60)
        yield


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp('page') / 'report.html'
    write_report([a_run()], path)
    return path


def test_budget_says_what_was_asked_met_and_left(page):
    assert 'parameters 4,000 75 % 1,000 995 5 16' in texts(page, 'budget')


def test_before_and_after_are_costs_in_per_cent_and_metrics_in_points(page):
    words = texts(page, 'metrics')
    assert 'parameters 4,000 1,000 −75.0 %' in words
    assert 'mIoU 71.50 70.25 −1.25' in words


def test_what_is_left_dense_stands_under_its_reason(page):
    assert 'depthwise 2 stem, neck' in texts(page, 'excluded')
    assert 'frozen 1 fc' in texts(page, 'excluded')


def test_command_and_versions_are_shown_and_the_config_is_text_alone(page):
    words = texts(page, 'provenance')
    assert 'python tools/train.py c.py' in words and 'torch 2.11' in words
    assert '&lt;Model&gt; &amp; more' in words


def test_of_a_run_that_has_just_begun_every_section_says_what_is_missing(tmp_path):
    missing = ('training', 'decisions', 'density', 'masks', 'importance', 'budget', 'metrics',
               'excluded', 'provenance')  # fmt: skip
    run = Run('young', 'work_dirs/young', missing={name: f'No {name} yet.' for name in missing})
    (path,) = write_report([run], tmp_path / 'report.html')
    for section in missing:
        assert f'No {section} yet.' in texts(path, section)
    assert '<img' not in path.read_text()


def test_a_run_still_going_shows_its_last_validation_and_no_kept_cost(tmp_path):
    budget = {key: x for key, x in a_run().budgets[0].items() if key not in ('kept', 'next_block')}
    run = a_run(finished=False, iteration=40, pruned={}, budgets=[{**budget, 'kept': None}])
    run.missing['metrics'] = 'Measured at the end.'
    path, *_ = write_report([run], tmp_path / 'report.html')
    assert 'last validation' in texts(path, 'metrics')
    assert '1,000 – –' in texts(path, 'budget')
    assert 'iteration 40 of 100' in path.read_text()


def test_runs_of_other_lengths_layers_and_states_are_compared(tmp_path):
    layers = [a_layer('backbone.a', 4, 8), a_layer('z', 2, 2)]
    other = a_run('other', timeline=Timeline(0, 40, 80), layers=layers)
    young = Run('young', 'c', missing={'importance': 'None.', 'masks': 'None.'})
    path, *pictures = write_report([a_run(), other, young], tmp_path / 'comparison.html')
    assert len(pictures) == 10 and all(picture.stat().st_size > 1000 for picture in pictures)
    assert '<h1>run · other · young</h1>' in path.read_text()
    assert 'young: None.' in texts(path, 'importance')


def test_many_layers_with_long_names_and_a_network_of_one_are_drawn(tmp_path):
    long = 'bbox_head.multi_level_convolutions.{}.branches.conv'
    for layers in ([a_layer(long.format(i), 2, 2) for i in range(60)], [a_layer('fc', 1, 1)]):
        _, *pictures = write_report([a_run(layers=layers)], tmp_path / 'report.html')
        assert {path.stem for path in pictures} >= {'density', 'masks-dark'}


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match='at least one run'):
        write_report([], tmp_path / 'report.html')


def test_the_usual_metric_of_a_task_is_drawn():
    seg = a_run(validation=[(1, {'aAcc': 80.0, 'mIoU': 40.0})])
    assert main_metric([seg]) == 'mIoU'
    assert main_metric([a_run(validation=[(1, {'own/score': 1.0})], pruned={})]) == 'own/score'
    assert main_metric([Run('young', '.')]) is None


def test_counts_are_written_short():
    assert [short(x) for x in (0, 999, 1000, 73_770, 7_493_888, 3.24e9)] == [
        '0', '999', '1k', '73.8k', '7.49M', '3.24G',
    ]  # fmt: skip
