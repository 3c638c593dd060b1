"""Tests of mmsmart.latency: tables are read exactly, or refused by name."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart.blocks import cut_layer
from mmsmart.latency import read_table

TABLE = """
unit: us
layers:
  - {pattern: '*', block: 2, fixed: 0.5}
  - pattern: head
    curve: [[0, 1], [0.5, 4], [1, 5]]
"""


def layers():
    """Six blocks of four, the last of each row of two; and four blocks in the head."""
    return [
        cut_layer('body', nn.Conv2d(5, 4, 1), (2, 2, 1, 1)),
        cut_layer('head.fc', nn.Linear(4, 4), (2, 2)),
    ]


@pytest.fixture(params=['table.yaml', 'table.json', 'dict'])
def table(request, tmp_path):
    import yaml

    if request.param == 'dict':
        return read_table(yaml.safe_load(TABLE))
    path = tmp_path / request.param
    text = json.dumps(yaml.safe_load(TABLE)) if path.suffix == '.json' else TABLE
    path.write_text(text)
    return read_table(path)


def test_blocks_cost_alike_and_curves_follow_the_density(table):
    cost = table.of_blocks(layers())
    assert table.unit == 'us'
    none, ones = torch.zeros(10), torch.ones(10)
    assert cost.of(none) == 0.5 + 1
    assert cost.of(ones) == 0.5 + 6 * 2 + 5
    half_of_the_head = none.index_fill(0, torch.tensor([0, 6, 7]), 1)
    assert cost.of(half_of_the_head) == 0.5 + 2 + 4


def test_a_table_of_blocks_alone_is_a_sum():
    table = read_table(
        {'layers': [{'pattern': '*', 'block': 0.5}, {'pattern': 'head', 'block': 3}]}
    )
    assert table.of_blocks(layers()).cost.dense().tolist() == [0.5] * 6 + [3.0] * 4


def test_a_layer_that_no_entry_means_is_named():
    table = read_table({'layers': [{'pattern': 'head', 'block': 3}]})
    with pytest.raises(ValueError, match="no entry of the table means the layer 'body'"):
        table.of_blocks(layers())


def test_channels_need_curves(table):
    assert table.of_layers(['head']).at(torch.tensor([0.25]).double())[0].tolist() == [2.5]
    with pytest.raises(ValueError, match="the entry '\\*' counts blocks, but block='channel'"):
        table.of_layers(['body'])


def entry(**values):
    return {'layers': [{'pattern': 'head', **values}]}


@pytest.mark.parametrize(
    ('content', 'parts'),
    [
        ([], ['expected the keys `layers`', 'list']),
        ({'layer': []}, ["['layer']"]),
        ({'layers': []}, ['layers: expected a list']),
        ({'layers': {}}, ['layers: expected a list']),
        ({'layers': [3]}, ['layers[0]', 'int']),
        ({'layers': [{'block': 1}]}, ['layers[0]: pattern', 'None']),
        ({'unit': '', **entry(block=1)}, ['unit', "''"]),
        (entry(), ['layers[0]', 'either `block` or `curve`']),
        (entry(block=1, curve=[[0, 1], [1, 2]]), ['either `block` or `curve`']),
        (entry(blok=1), ["'blok'"]),
        (entry(block='fast'), ['block: expected a number', "'fast'"]),
        (entry(block=True), ['block: expected a number', 'True']),
        (entry(block=-1), ['block: expected a finite number', '-1']),
        (entry(block=math.nan), ['block: expected a finite number', 'nan']),
        (entry(block=0), ['block: 0 is free']),
        (entry(block=1, fixed=-2), ['fixed', '-2']),
        (entry(curve=[[0, 1], [1, 2]], fixed=1), ['fixed', 'a curve has it at density 0']),
        (entry(curve=3), ['curve: expected 2 to']),
        (entry(curve=[[0, 1]]), ['curve: expected 2 to']),
        (entry(curve=[[0, 1], [1]]), ['curve[1]', '[1]']),
        (entry(curve=[[0.1, 1], [1, 2]]), ['runs over densities 0.1 to 1', 'begin at 0']),
        (entry(curve=[[0, 1], [0.9, 2]]), ['runs over densities 0 to 0.9', 'end at 1']),
        (entry(curve=[[0, 1], [0.5, 1], [0.5, 2], [1, 2]]), ['curve[2]', 'does not rise']),
        (entry(curve=[[0, 1], [0.5, 3], [1, 2]]), ['curve[2]', 'falls from 3 to 2']),
        (entry(curve=[[0, 0], [1, 0]]), ['0 everywhere']),
    ],
)
def test_a_wrong_table_is_refused_with_file_and_entry(content, parts, tmp_path):
    path = tmp_path / 'table.json'
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_table(path)
    assert str(error.value).startswith(f'latency: {path}')
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ('name', 'content', 'said'),
    [
        ('table.json', '{"layers": ', 'can not be read'),
        ('table.yaml', 'layers: [', 'is no YAML'),
        ('table.yaml', 'a: &a [1]\nb: *a', 'aliases'),
        ('table.yaml', '!!python/object/apply:os.getcwd []', 'is no YAML'),
        ('table.json', '[' * 100_000, 'can not be read'),
        ('table.json', '\udcff', 'can not be read'),
    ],
)
def test_a_file_that_is_no_table_is_refused(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match=said) as error:
        read_table(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*none.yaml'"):
        read_table(tmp_path / 'none.yaml')


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(['unit', 'layers', 'pattern', 'block', 'fixed', 'curve']) | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(values)
def test_whatever_the_content_it_is_read_or_refused(content):
    if not isinstance(content, dict):
        content = {'layers': content}
    try:
        table = read_table(content)
    except ValueError as error:
        assert str(error).startswith('latency: ')
    else:
        assert table.entries
