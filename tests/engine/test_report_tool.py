"""`tools/report.py` on a digits run: a browser shows every section and has nothing to complain."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from engine.runs import REPO

TOOL = runpy.run_path(str(REPO / 'tools/report.py'))
SECTIONS = (
    'training', 'decisions', 'metrics', 'budget', 'density', 'masks', 'importance', 'excluded',
    'provenance',
)  # fmt: skip
PICTURES = ('training', 'decisions', 'density', 'masks', 'importance')
CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))),
    None,
)
browser = pytest.mark.skipif(CHROMIUM is None, reason='no chromium on the PATH to open the page')


def make_report(*arguments):
    """Run the tool in this process."""
    before, sys.argv = sys.argv, ['tools/report.py', *map(str, arguments)]
    try:
        TOOL['main']()
    finally:
        sys.argv = before


def open_in_chromium(page, folder, *switches):
    """What the browser wrote; console messages and refused requests are lines with CONSOLE."""
    done = subprocess.run(
        [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--no-first-run', f'--user-data-dir={folder / "profile"}', '--enable-logging=stderr',
         '--v=0', *switches, page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if 'CONSOLE' in line]


@pytest.fixture(scope='module')
def page(finished_run, tmp_path_factory):
    """The report of a finished digits run."""
    work_dir = tmp_path_factory.mktemp('report') / 'digits'
    shutil.copytree(finished_run[0], work_dir)
    make_report(work_dir)
    return work_dir / 'report.html'


def test_one_file_has_every_section_and_every_picture_in_light_and_dark(page):
    html = page.read_text()
    for section in SECTIONS:
        assert html.count(f'<section id="{section}">') == 1
    assert html.count('<img src="data:image/png;base64,') == len(PICTURES)
    assert html.count('dark)" srcset="data:image/png;base64,') == len(PICTURES)
    assert "default-src 'none'; img-src data:" in html


def test_nothing_in_the_file_points_outside(page):
    shown = re.sub(r'<pre>.*?</pre>', '', page.read_text(), flags=re.S)  # the config is text
    assert not re.search(r'(?:src|href|srcset)="(?!data:|#)', shown)
    assert 'url(' not in shown and '<script' not in shown and '@import' not in shown


def test_the_pictures_lie_beside_it_as_png(page):
    names = {path.name for path in (page.parent / 'report').iterdir()}
    assert names == {f'{name}{dark}.png' for name in PICTURES for dark in ('', '-dark')}
    for name in names:
        picture = cv2.imread(str(page.parent / 'report' / name))
        assert picture.shape[1] == 2160 and picture.std() > 5
        assert (picture.mean() < 100) == name.endswith('-dark.png')


@browser
def test_chromium_opens_it_without_console_message_or_request(page, tmp_path):
    document, console = open_in_chromium(page, tmp_path, '--dump-dom')
    assert console == []
    for section in SECTIONS:
        body = re.search(f'<section id="{section}">(.*?)</section>', document, flags=re.S)[1]
        assert '<h2>' in body and re.search('<img|<table|<pre|<p', body)


@browser
@pytest.mark.parametrize(
    'fault', ['<img src="https://example.org/a.png">', '<script src="a.js"></script>']
)
def test_that_check_sees_a_request(page, tmp_path, fault):
    wrong = tmp_path / 'wrong.html'
    wrong.write_text(page.read_text().replace('</main>', f'{fault}</main>'))
    _, console = open_in_chromium(wrong, tmp_path, '--dump-dom')
    assert len(console) == 1 and 'Content Security Policy' in console[0]


@browser
def test_its_screenshots_show_light_and_dark_pictures(page, tmp_path):
    means = {}
    for theme, switches in (('light', []), ('dark', ['--blink-settings=preferredColorScheme=0'])):
        file = tmp_path / f'{theme}.png'
        size = '--window-size=1240,4000'
        open_in_chromium(page, tmp_path, size, f'--screenshot={file}', *switches)
        shot = cv2.imread(str(file))
        assert shot.shape == (4000, 1240, 3)
        for band in np.array_split(shot[:3000], 6):
            assert band.std() > 5  # no part of it is blank
        blue, red = (shot[..., i].astype(int) for i in (0, 2))
        assert ((blue > 180) & (blue - red > 80)).mean() > 0.01  # kept blocks and bars
        means[theme] = shot.mean()
    assert means['light'] > 200 and means['dark'] < 70


def test_two_runs_stand_side_by_side(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr('mmsmart.html_report.page._DPI', 60)  # drawn faster
    for name in ('one', 'other'):
        shutil.copytree(finished_run[0], tmp_path / name)
    make_report(tmp_path / 'one', tmp_path / 'other', '--layers', 'backbone.layer4.1.*')
    html = (tmp_path / 'one/comparison.html').read_text()
    assert '<h1>one · other</h1>' in html
    head = re.search(r'<section id="metrics">.*?</thead>', html, flags=re.S)[0]
    assert head.count('<th colspan="3">') == 2 and head.count('<th>pruned</th>') == 2
    assert (tmp_path / 'one/comparison/masks.png').is_file()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere: not the folder of a training run'),
        (['{run}', '--layers', 'neck.*'], "'neck.*' matches no pruned layer. Names look like"),
        (['{run}', '--out', '{run}/page'], 'page has no ending, such as'),
        (['{run}', '--metric', 'mIoU'], "no run has 'mIoU', only accuracy/top1"),
    ],
)
def test_wrong_arguments_are_named(page, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        make_report(*(argument.format(run=page.parent) for argument in arguments))


def test_runs_of_one_name_are_told_apart():
    assert TOOL['names_of'](['a/x', 'b/x', 'b/y']) == ['a/x', 'b/x', 'b/y']
    assert TOOL['names_of'](['a/x', 'b/y']) == ['x', 'y']
