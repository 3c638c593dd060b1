"""What the documentation shows runs, and what it points to exists."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections import defaultdict
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from string import Template

import pytest
import torch
from torch import nn

import mmsmart

REPO = Path(__file__).parents[1]
PAGES = sorted([REPO / 'README.md', *REPO.glob('docs/**/*.md')])


def blocks(page: Path, language: str = 'python') -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), flags=re.M | re.S)


def shell_lines(page: Path) -> list[str]:
    """Every line that a page tells a person to type, continued lines as one."""
    text = ''.join(blocks(page, 'shell')).replace('\\\n', ' ')
    return [line.split(' #')[0].strip() for line in text.splitlines() if line.strip()]


def example(page: str, part: str) -> str:
    """The one example of a page that holds this text."""
    (found,) = [block for block in blocks(REPO / page) if part in block]
    return found


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', page.read_text()):
        assert (page.parent / target).exists(), f'{page.name} links to {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_python_example_parses(page):
    for block in blocks(page):
        assert ast.parse(block).body, f'{page.name} has an empty example'


def test_the_plain_torch_example_prunes_to_its_sparsity():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    names = {
        'model': model,
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        'loss_of': lambda net: net(torch.ones(4, 32)).square().mean(),
        'steps': 20,
        'more_steps': 5,
    }
    exec(example('docs/method.md', 'remove_masks'), names)
    weights = [model[0].weight, model[2].weight]
    total = sum(weight.numel() for weight in weights)
    kept = sum(int((weight != 0).sum()) for weight in weights)
    assert total * 0.2 - 16 * 8 < kept <= total * 0.2
    assert mmsmart.masks_of(model) is None


def test_the_table_of_keys_names_every_key_with_its_default():
    from mmsmart.engine.config import Smart

    text = (REPO / 'docs/configuration.md').read_text()
    table = text[text.index('| key | default |') : text.index('| key | allowed |')]
    rows = dict(re.findall(r'^\| `(\w+)` \| `(.+?)`[^|`]*\|', table, flags=re.M))
    assert set(rows) >= {item.name for item in fields(Smart)}
    base: dict = {}
    exec((REPO / 'configs/_base_/smart.py').read_text(), base)
    for key, default in base['smart'].items():
        assert eval(rows[key]) == default, f'docs/configuration.md on {key}'


def test_every_page_is_in_the_navigation_once():
    named = re.findall(r'^ +- .*?([\w/-]+\.md)$', (REPO / 'mkdocs.yml').read_text(), flags=re.M)
    there = [path.relative_to(REPO / 'docs').as_posix() for path in REPO.glob('docs/**/*.md')]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_link_into_a_page_leads_to_a_heading(page):
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#]*)#([^)]+)\)', page.read_text()):
        text = (page.parent / target if target else page).read_text()
        headings = re.findall(r'^#+ (.*)$', text, flags=re.M)
        # As MkDocs and GitHub make them of what these headings hold.
        made = {re.sub(r'[^\w\- ]', '', heading.lower()).strip() for heading in headings}
        assert anchor in {re.sub(r'[ -]+', '-', heading) for heading in made}, f'{target}#{anchor}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_make_target_and_extra_that_is_named_exists(page):
    text = page.read_text()
    targets = set(re.findall(r'^([a-z-]+):', (REPO / 'Makefile').read_text(), flags=re.M))
    named = {word for line in shell_lines(page) for word in re.findall(r'^make ([a-z-]+)', line)}
    assert named | set(re.findall(r'`make ([a-z-]+)`', text)) <= targets
    extras = set(re.findall(r"^        '(\w+)': \[", (REPO / 'setup.py').read_text(), flags=re.M))
    for listed in re.findall(r"pip install [^`\n]*'(?:mmsmart|\.)\[([\w,]+)\]", text):
        assert set(listed.split(',')) <= extras


def parser_of(tool: str):
    """How a tool reads its arguments: our own, or the stock tool that ours runs."""
    if tool in ('train.py', 'test.py'):
        path = Path(find_spec('mmpretrain').origin).parent / '.mim/tools' / tool
    else:
        path = REPO / 'tools' / tool
    return runpy.run_path(str(path))['parse_args']


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_tool_takes_the_arguments_that_a_page_gives_it(page, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')
    for line in shell_lines(page):
        line = Template(line).safe_substitute(defaultdict(lambda: 'x'))
        if not line.startswith('python tools/') or line.endswith('.py'):
            continue
        tool, *words = shlex.split(line)[1:]
        monkeypatch.setattr(sys, 'argv', [tool, *words])
        assert isinstance(parser_of(Path(tool).name)(), argparse.Namespace), line


def test_the_example_that_reads_a_result_prints_every_layer(tmp_path, monkeypatch, capsys):
    write_report(tmp_path / 'work_dirs/my_resnet_smart')
    monkeypatch.chdir(tmp_path)
    exec(example('docs/prune-your-own.md', 'pruning.json'), {})
    assert capsys.readouterr().out == (
        "104 of 110.0\n{'params': 300, 'macs': 900, 'accuracy/top1': 91.0}\n"
        "{'params': 150, 'macs': 300, 'accuracy/top1': 90.5}\n 50.0% first\n 20.0% second\n"
        "{'name': 'third', 'reason': 'depthwise'}\n"
    )


def test_the_example_that_compares_sparsities_prints_a_line_for_each(tmp_path, monkeypatch, capsys):
    for folder in ('at_0.5', 'at_0.7', 'other'):
        write_report(tmp_path / 'work_dirs' / folder)
    monkeypatch.chdir(tmp_path)
    exec(example('docs/choosing-a-sparsity.md', 'at_*'), {})
    line = '65.3% removed, 33.3% of the MACs: accuracy/top1 91 -> 90.5\n'
    assert capsys.readouterr().out == 2 * line


def write_report(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / 'pruning.json').write_text(
        """{"kept": 104, "budget": 110.0, "achieved_sparsity": 0.653,
        "dense": {"params": 300, "macs": 900, "accuracy/top1": 91.0},
        "pruned": {"params": 150, "macs": 300, "accuracy/top1": 90.5},
        "layers": [{"name": "first", "params_kept": 5, "params_total": 10},
                   {"name": "second", "params_kept": 2, "params_total": 10}],
        "excluded": [{"name": "third", "reason": "depthwise"}]}"""
    )


def test_the_example_that_runs_an_onnx_file_names_its_outputs(tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')
    onnx = pytest.importorskip('onnx')
    make = onnx.helper
    ends = [make.make_tensor_value_info(name, 1, [1, 3, 8, 8]) for name in ('images', 'scores')]
    node = make.make_node('Relu', ['images'], ['scores'])
    model = make.make_model(
        make.make_graph([node], 'net', ends[:1], ends[1:]),
        opset_imports=[make.make_opsetid('', 17)],
        ir_version=9,
    )
    onnx.save(model, tmp_path / 'pruned.onnx')
    monkeypatch.chdir(tmp_path)
    exec(example('docs/exporting.md', 'InferenceSession'), {})
    assert capsys.readouterr().out == "{'scores': (1, 3, 8, 8)}\n"


def test_the_example_for_channels_of_any_module_prunes_half():
    pytest.importorskip('torch_pruning')
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    names = {'model': model, 'images': torch.ones(1, 3, 8, 8)}
    exec(example('docs/coming-from.md', 'install_masks'), names)
    masks = names['masks']
    assert masks.budget == pytest.approx(0.5 * masks.total_cost)


def test_the_example_of_a_method_prunes_by_its_score():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    names: dict = {}
    exec(example('docs/extending.md', 'class Saliency'), names)
    masks = mmsmart.install_masks(model, sparsity=0.8, block=(16, 8), method=names['Saliency']())
    masks.begin(torch.zeros(masks.num_blocks))
    for progress in (0.5, 1.0):
        model(torch.ones(4, 32)).square().mean().backward()
        masks.method.progress = progress
        with masks.latent_weights():
            pass
    score, kept = masks.method.average, masks.mask().bool()
    assert masks.kept_cost() <= masks.budget < masks.kept_cost() + 16 * 8
    assert score[kept].mean() > score[~kept].mean()
    masks.harden()


def test_the_example_of_a_resource_grows_with_every_block(capsys):
    names: dict = {}
    exec(example('docs/extending.md', 'class StoredBytes'), names)
    cost, kept = names['cost'], names['kept']
    assert kept.tolist() == [0, 1, 1] and cost.of(kept) == 4 * 160 + 8 <= 700
    assert '648.0' in capsys.readouterr().out


def test_a_plan_has_what_the_page_on_extending_lists():
    from mmsmart.plans import BlockPlan, ChannelPlan, NOfMPlan

    text = (REPO / 'docs/extending.md').read_text()
    table = text[text.index('A plan has') : text.index('`mmsmart.BlockMasks(plan)`')]
    listed = {name for name in re.findall(r'`(\w+)[(`]', table)} - {'scores', 'mask', 'kept'}
    assert len(listed) > 12
    for plan in (BlockPlan, ChannelPlan, NOfMPlan):
        instance_only = {'layers', 'excluded', 'budgets', 'weights'}
        assert not {name for name in listed - instance_only if not hasattr(plan, name)}, plan


def test_pictures_show_what_is_said_of_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / 'docs')
    import pictures

    temperatures, masks = pictures.hardening(points=25)
    assert (temperatures.diff() < 0).all()
    torch.testing.assert_close(masks.sum(1), torch.full((25,), 10.0).double(), rtol=1e-6, atol=0)
    undecided = ((masks > 0.05) & (masks < 0.95)).double().mean(1)
    assert undecided[0] > 0.9 and undecided[-1] == 0

    stuck, free = pictures.descent(end=1.0), pictures.descent(end=pictures.END)
    assert (stuck.masks[-1] - stuck.masks[0]).abs().max() < 1e-9
    assert free.masks[-1].round().sum() == pictures.STAY
    assert (free.masks[-1] - free.masks[-1].round()).abs().max() < 0.01
    assert stuck.loss < free.loss == pytest.approx(free.hardened, rel=0.01)
    assert free.hardened < 0.6 * stuck.hardened

    pictures.main(tmp_path)
    for drawn in tmp_path.iterdir():
        assert drawn.stat().st_size > 10_000
        assert (REPO / 'docs/images' / drawn.name).is_file()
