"""Every file that we read, changed in any way, is read or refused by a message with its field.

Eighty files of each kind every day; `make test-slow ARGS='-k fuzz'` tries 10,000.
"""

from __future__ import annotations

import json
import re
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.latency import read_table
from mmsmart.packed import FORMAT, load_packed, save_packed
from mmsmart.pruning_json import read_report
from mmsmart.shrink import Kept, read_structure, structure_of

EVERY_DAY, SLOW = 80, 10_000
SECONDS_FOR_A_FILE, SECONDS_FOR_A_BYTE = 1.0, 1e-4  # of computing; the latter is YAML's
# An empty list takes two bytes of a file and some sixty of memory, an object more.
MEMORY_FOR_A_BYTE, MEMORY_FOR_A_FILE = 200, 2**20
MEMORY_AT_ALL = 2**28  # of the process, over all files: four times what load_packed may take


@dataclass
class Format:
    """A kind of file: how it is read, and a right one as a tree of lists and objects."""

    read: Callable[[Path], Any]
    tree: Any
    fields: str  # how messages about one field begin, after the name of the file
    name: str = 'file.json'
    encode: Callable[[Any], bytes] = lambda tree: json.dumps(tree).encode()
    traced: bool = True  # whether its memory is traced, beside that of the process


def structure_format(folder: Path) -> Format:
    net = nn.ModuleDict({'conv': nn.Conv2d(3, 8, 3), 'norm': nn.BatchNorm2d(8)})
    stay = torch.tensor([0, 3, 7])
    tree = structure_of(net, {'conv': Kept(stay), 'norm': Kept(stay)})
    return Format(read_structure, tree, r'(format|version|layers(\..*)?): ')


def report_format(folder: Path) -> Format:
    amounts = dict(target_sparsity=0.5, budget=36.0, kept=36.0, next_block_cost=4.0)
    figures = {'params': 100, 'macs': 900, 'accuracy/top1': 97.5, 'coco/bbox_mAP': None}
    layer = dict(
        name='head.fc', shape=[8, 9], block=[4, 1], groups=1, blocks_total=18, blocks_kept=9,
        params_total=72, params_kept=36, macs_total=72, macs_kept=36, at_floor=False,
    )  # fmt: skip
    tree = dict(
        method='smart', resource='params', achieved_sparsity=0.5, **amounts,
        budgets=[dict(part='', resource='params', total=72, **amounts)],
        dense=figures, pruned=figures, layers=[layer, {**layer, 'block': 'channel'}],
        excluded=[dict(name='embed', reason='another kind of weight')],
    )  # fmt: skip
    rows = r'(layers|excluded|budgets)(\[\d+\](\.\w+)?)?'
    return Format(
        read_report, tree, rf'({"|".join(tree)}|{rows}|(dense|pruned)\..*|expected an obj)'
    )


def packed_format(folder: Path) -> Format:
    state = {'fc.weight': torch.eye(6), 'bias': torch.ones(6), 'conv.weight': torch.ones(4, 3, 2)}
    state['tied.weight'] = state['fc.weight']
    rows = [
        {'name': 'fc', 'shape': [6, 6], 'block': [2, 2], 'groups': 1},
        {'name': 'conv', 'shape': [4, 3, 2], 'block': [2, 2, 1], 'groups': 2},
    ]
    save_packed(state, rows, folder / 'whole.safetensors')
    data = (folder / 'whole.safetensors').read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    entry = json.loads(header['__metadata__'][FORMAT])

    def encode(tree: Any) -> bytes:
        if isinstance(tree, dict) and isinstance(tree.get('header'), dict):
            metadata = {FORMAT: json.dumps(tree.get('entry'))}
            tree = {'__metadata__': metadata, **tree['header']}
        head = json.dumps(tree).encode()
        return struct.pack('<Q', len(head)) + head + body

    del header['__metadata__']
    fields = (
        r'(version|weights|aliases|meta|.*\.(blocks|index))(\[.*\])?(\.\w+)?: |'
        r'not a readable safetensors|.*: the file holds it packed and dense'
    )
    tree = {'header': header, 'entry': entry}
    return Format(load_packed, tree, fields, 'file.safetensors', encode)


def table_format(folder: Path) -> Format:
    tree = {
        'unit': 'us',
        'layers': [
            {'pattern': '*', 'block': 0.5, 'fixed': 1},
            {'pattern': 'head', 'curve': [[0, 0.1], [0.5, 2], [1, 2.5]]},
        ],
    }
    return Format(
        read_table, tree, r'(unit|layers(\[\d+\](: \w+(\[\d+\])?)?)?): |expected the keys'
    )


def yaml_format(folder: Path) -> Format:
    table = table_format(folder)
    table.name = 'file.yaml'  # JSON is YAML
    table.traced = False  # it makes the recursion that ends in an error a hundred times slower
    return table


FORMATS = {
    'pruning.json': report_format,
    'structure.json': structure_format,
    'packed blocks': packed_format,
    'latency table': table_format,
    'latency table in YAML': yaml_format,
}

numbers = st.sampled_from([0, 1, -1, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5])
odd = st.sampled_from([None, True, '', 'x' * 999, float('nan'), float('inf'), [], {}, [[]], [{}]])
values = st.recursive(
    numbers | odd | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
changes = st.lists(
    st.tuples(
        st.lists(st.integers(0, 20), max_size=6),  # which way to go down the tree
        st.sampled_from(['put', 'put', 'drop', 'add', 'repeat']),
        values,
    ),
    min_size=1,
    max_size=3,
)
damage = st.tuples(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),  # bytes
    st.floats(0, 2),  # where it is cut
    st.tuples(st.floats(0, 1), st.sampled_from([b'', b'[', b'{"":', b'9', b'- ', b'&a [*a,']))
    .flatmap(lambda at: st.tuples(st.just(at), st.sampled_from([1, 1000, 30_000]))),
)  # fmt: skip


def changed(tree: Any, way: list[int], verb: str, value: Any) -> Any:
    """A copy with one place of it changed."""
    if isinstance(tree, (dict, list)) and tree and way:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key, copied = keys[way[0] % len(keys)], tree.copy()
        if len(way) == 1 and verb == 'drop':
            del copied[key]
        elif len(way) == 1 and verb == 'add':
            copied.insert(key, value) if isinstance(copied, list) else copied.update(new=value)
        elif len(way) == 1 and verb == 'repeat' and isinstance(copied, list):
            copied += copied * 50
        else:
            copied[key] = changed(tree[key], way[1:], verb, value)
        return copied
    return value


def damaged(data: bytes, bytes_: list, cut: float, more: tuple) -> bytes:
    broken = bytearray(data[: int(cut * len(data))])
    (at, what), times = more
    place = int(at * len(broken))
    broken[place:place] = what * times
    for at, value in bytes_ if broken else ():
        broken[int(at * (len(broken) - 1))] = value
    return bytes(broken)


def refusal(kind: Format, path: Path) -> str | None:
    try:
        kind.read(path)
    except ValueError as error:
        return str(error)
    return None


def try_to_read(kind: Format, path: Path, data: bytes) -> str | None:
    """What the file was refused with, after its name; None if it was read."""
    path.write_bytes(data)
    began = time.process_time()
    message = refusal(kind, path)
    took = time.process_time() - began
    assert took < SECONDS_FOR_A_FILE + SECONDS_FOR_A_BYTE * len(data)
    if kind.traced:
        tracemalloc.start()
        refusal(kind, path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < MEMORY_FOR_A_BYTE * len(data) + MEMORY_FOR_A_FILE
    if message is None:
        return None
    assert str(path) in message and len(message) < 2000
    return message.partition(str(path))[2].lstrip(': ')


def assert_read_or_refused(name: str, folder: Path, examples: int) -> None:
    kind = FORMATS[name](folder)
    path = folder / kind.name
    assert try_to_read(kind, path, kind.encode(kind.tree)) is None, 'the right file is read'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {'read': 0, 'refused': 0}
    # What fails is shown as it is: to find a smaller file would take minutes.
    many = settings(
        max_examples=examples // 2,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @many
    @given(changes)
    def fields(steps):
        tree = kind.tree
        for step in steps:
            tree = changed(tree, *step)
        message = try_to_read(kind, path, kind.encode(tree))
        counts['read' if message is None else 'refused'] += 1
        assert message is None or re.match(kind.fields, message), message

    @many
    @given(damage)
    def raw(how):
        message = try_to_read(kind, path, damaged(kind.encode(kind.tree), *how))
        counts['read' if message is None else 'refused'] += 1

    fields()
    raw()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f'{name}: {counts["read"]:,} read, {counts["refused"]:,} refused, {grown:,} KiB grown')
    assert sum(counts.values()) >= examples * 0.9
    assert counts['refused'] > 0
    assert grown * 1024 < MEMORY_AT_ALL


@pytest.mark.parametrize('name', FORMATS)
def test_eighty_changed_files_are_read_or_refused_by_their_field(tmp_path, name):
    assert_read_or_refused(name, tmp_path, EVERY_DAY)


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMATS)
def test_ten_thousand_changed_files_are_read_or_refused_by_their_field(tmp_path, name):
    assert_read_or_refused(name, tmp_path, SLOW)
