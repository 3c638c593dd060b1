"""The model index, which MIM reads, lists what is shipped and claims only what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.fileio import load

REPO = Path(__file__).parents[1]
FILES = [REPO / file for file in load(REPO / 'model-index.yml')['Import']]
MODELS = [model for file in FILES for model in load(file)['Models']]
SHIPPED = sorted(
    path.relative_to(REPO).as_posix()
    for path in REPO.glob('configs/*/*.py')
    if path.parent.name != '_base_'
)
# A heading, and what stands below it
SECTIONS = re.split(r'^##+ ', (REPO / 'docs/benchmarks.md').read_text(), flags=re.M)[1:]


def test_the_index_imports_every_metafile():
    assert sorted(FILES) == sorted(REPO.glob('configs/*/metafile.yml'))


def test_every_shipped_config_is_listed_once_and_nothing_else():
    assert sorted(model['Config'] for model in MODELS) == SHIPPED


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_an_entry_says_what_its_config_says(model):
    assert model['Name'] == Path(model['Config']).stem
    text, metadata = (REPO / model['Config']).read_text(), model['Metadata']
    sparsity = re.search(r'sparsity=([\d.]+)', text)
    assert metadata.get('Sparsity') == (float(sparsity[1]) if sparsity else None)
    if 'Start From' in metadata:
        assert re.search(rf'^# .*\b{re.escape(metadata["Start From"])}$', text, flags=re.M)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.parent.name)
def test_collections_are_those_of_the_models_and_name_pages_that_exist(file):
    index = load(file)
    names = {collection['Name'] for collection in index['Collections']}
    assert {model['In Collection'] for model in index['Models']} == names
    for collection in index['Collections']:
        assert (REPO / collection['README']).is_file()


def test_every_result_stands_in_the_benchmarks_of_its_data_set():
    results = [(model, result) for model in MODELS for result in model.get('Results', [])]
    assert results
    for model, result in results:
        sections = [text for text in SECTIONS if result['Dataset'] in text.splitlines()[0]]
        for metric, value in result['Metrics'].items():
            number = rf'(?<![\d.,]){re.escape(str(value))}(?![\d.,]*\d)'
            assert any(re.search(number, text) for text in sections), (model['Name'], metric)
