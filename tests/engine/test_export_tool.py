"""Tests of tools/export.py: a run in, files that others can run out."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings

import pytest
import torch

from engine.runs import REPO, run_tool, smart_config, stock_config, write_config
from engine.test_raw_forward import EVERY_DAY, SLOW, built
from mmsmart.engine.export import load_model, read_checkpoint, read_config
from mmsmart.engine.raw_forward import RawForward, example_input
from mmsmart.export import save_exported_program, save_onnx, save_plain_checkpoint
from mmsmart.packed import load_packed
from mmsmart.shrink import Kept, cut_channels, structure_of


@pytest.fixture
def run(tmp_path, finished_run):
    """A folder with a run's config and files, for a tool to write into."""
    finished, _ = finished_run
    for name in ('pruned.pth', 'pruning.json', 'epoch_2.pth', 'epoch_4.pth'):
        shutil.copy(finished / name, tmp_path)
    write_config(tmp_path / 'config.py', smart_config(tmp_path))
    return tmp_path


def export(run, checkpoint, *arguments):
    with warnings.catch_warnings():  # the tool sets filters of its own
        run_tool(
            REPO / 'tools/export.py', str(run / 'config.py'), str(run / checkpoint), *arguments
        )


def refused(run, checkpoint, *arguments):
    """The message of an export that fails; nothing may be left of it."""
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit) as failure:
        export(run, checkpoint, *arguments)
    assert sorted(run.iterdir()) == before
    return str(failure.value)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# Checkpoints


@pytest.mark.parametrize('checkpoint', ['epoch_4.pth', 'pruned.pth'])
def test_a_plain_checkpoint_holds_what_pruned_pth_holds(run, checkpoint):
    export(run, checkpoint, '--to', 'checkpoint', '--out', str(run / 'new/plain.pth'))
    plain = torch.load(run / 'new/plain.pth', weights_only=True)
    pruned = torch.load(run / 'pruned.pth', weights_only=True)
    assert sorted(plain) == ['meta', 'state_dict']
    assert list(plain['meta']) == ['dataset_meta']
    assert_same_tensors(plain['state_dict'], pruned['state_dict'])


def test_the_file_lies_beside_the_checkpoint_by_default(run):
    export(run, 'pruned.pth', '--to', 'checkpoint')
    assert (run / 'pruned_plain.pth').is_file()


def test_packed_blocks_come_back_bit_for_bit(run):
    export(run, 'epoch_4.pth', '--to', 'blocks', '--out', str(run / 'blocks.safetensors'))
    pruned = torch.load(run / 'pruned.pth', weights_only=True)['state_dict']
    assert_same_tensors(load_packed(run / 'blocks.safetensors'), pruned)
    assert (run / 'blocks.safetensors').stat().st_size < (run / 'pruned.pth').stat().st_size


def test_a_model_is_loaded_from_packed_blocks_too(run):
    export(run, 'pruned.pth', '--to', 'blocks')
    config = read_config(run / 'config.py')
    packed = load_model(config, run / 'pruned_blocks.safetensors')
    assert_same_tensors(packed.state_dict(), load_model(config, run / 'pruned.pth').state_dict())


def shrunk(run):
    """Write shrunk.pth and structure.json: two channels between two convolutions are cut out."""
    model = load_model(read_config(run / 'config.py'), run / 'pruned.pth')
    stay, block = torch.arange(2, 8), 'backbone.layer1.0'
    kept = {f'{block}.conv1': Kept(stay), f'{block}.bn1': Kept(stay)}
    kept[f'{block}.conv2'] = Kept(None, stay)
    (run / 'structure.json').write_text(json.dumps(structure_of(model, kept)))
    cut_channels(model, kept)
    save_plain_checkpoint(model, run / 'shrunk.pth')
    return model


def test_a_shrunk_checkpoint_is_loaded_by_the_structure_beside_it(run):
    model, config = shrunk(run), read_config(run / 'config.py')
    loaded = load_model(config, run / 'shrunk.pth')
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    images = example_input(config)
    assert torch.equal(RawForward(loaded)(images)[0], RawForward(model.eval())(images)[0])
    dense = load_model(config, run / 'pruned.pth')  # beside the same structure.json
    assert dense.backbone.layer1[0].conv1.weight.shape[0] == 8


def test_a_config_of_a_shrunk_model_builds_it(run):
    model, config = shrunk(run), read_config(run / 'config.py')
    config.model = dict(
        type='mmsmart.ShrunkModel', model=config.model, structure=str(run / 'structure.json')
    )
    (run / 'structure.json').rename(run / 'elsewhere.json')
    config.model.structure = str(run / 'elsewhere.json')
    assert_same_tensors(load_model(config, run / 'shrunk.pth').state_dict(), model.state_dict())
    assert load_model(config).backbone.layer1[0].conv1.weight.shape[0] == 6


def test_a_shrunk_checkpoint_without_its_structure_is_refused(run):
    shrunk(run)
    (run / 'structure.json').unlink()
    assert 'conv1.weight is (6, 8, 3, 3)' in refused(run, 'shrunk.pth', '--to', 'onnx')


def silenced(run):
    """pruned.pth whose first two channels between two convolutions are zero, with its structure."""
    shrunk(run)
    model = load_model(read_config(run / 'config.py'), run / 'pruned.pth')
    first = model.backbone.layer1[0]
    for tensor in (first.conv1.weight, first.bn1.weight, first.bn1.bias):
        tensor.data[:2] = 0
    save_plain_checkpoint(model, run / 'pruned.pth')
    return model


def test_a_shrunk_export_is_smaller_and_gives_the_same_scores(run):
    masked = silenced(run)
    export(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'new/small.pth'))
    config = read_config(run / 'new/small.py')
    assert 'smart' not in config and 'runner_type' not in config
    small = load_model(config, config.load_from)
    assert small.backbone.layer1[0].conv1.weight.shape[0] == 6
    images = example_input(config)
    ours, theirs = RawForward(small)(images)[0], RawForward(masked.eval())(images)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_shrunk_export_leaves_the_structure_of_another_alone(run):
    silenced(run)
    export(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'new/small.pth'))
    export(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'new/again.pth'))
    other = json.loads((run / 'new/structure.json').read_text())
    other['made'] = 'elsewhere'
    (run / 'new/structure.json').write_text(json.dumps(other))
    message = refused(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'new/tiny.pth'))
    assert 'structure.json: the structure of another shrunk model' in message
    assert not (run / 'new/tiny.pth').exists()


def test_a_shrunk_folder_can_be_moved_and_exported_again(run):
    silenced(run)
    export(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'new/small.pth'))
    (run / 'new').rename(run / 'moved')
    arguments = ['tools/export.py', str(run / 'moved/small.py'), str(run / 'moved/small.pth')]
    run_tool(REPO / arguments[0], *arguments[1:], '--to', 'checkpoint', '--out', str(run / 'x.pth'))
    again = torch.load(run / 'x.pth', weights_only=True)['state_dict']
    assert again['backbone.layer1.0.conv1.weight'].shape[0] == 6


def test_channels_that_are_not_silent_are_not_cut(run):
    shrunk(run)
    save_plain_checkpoint(load_model(read_config(run / 'config.py')), run / 'pruned.pth')
    message = refused(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'small.pth'))
    assert 'differ from the model' in message


def test_a_shrunk_export_needs_a_structure(run):
    message = refused(run, 'pruned.pth', '--to', 'shrunk', '--out', str(run / 'small.pth'))
    assert 'structure.json' in message and 'no such file' in message


# Graphs


def test_onnx_runtime_scores_as_the_pruned_model(run, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    export(run, 'pruned.pth', '--to', 'onnx', '--shape', '16')
    assert 'differs from the model by at most' in capsys.readouterr().out
    config = read_config(run / 'config.py')
    images = example_input(config, [16])
    session = onnxruntime.InferenceSession(run / 'pruned.onnx', providers=['CPUExecutionProvider'])
    (scores,) = session.run(['scores'], {'images': images.numpy()})
    with torch.no_grad():
        (expected,) = RawForward(load_model(config, run / 'pruned.pth'))(images)
    torch.testing.assert_close(torch.from_numpy(scores), expected)


def test_the_size_of_an_exported_program_is_that_of_the_test_pipeline(run):
    export(run, 'pruned.pth', '--to', 'pt2')
    program = torch.export.load(run / 'pruned.pt2').module()
    (scores,) = program(torch.zeros(1, 3, 16, 16))
    assert scores.shape == (1, 10)


MODELS = [*EVERY_DAY[3:4], *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
MODELS += [pytest.param(*row, marks=pytest.mark.slow) for row in EVERY_DAY[1:3] + EVERY_DAY[4:]]


@pytest.mark.parametrize(('name', 'edge', 'first', 'raw', 'auxiliary'), MODELS)
def test_a_model_computes_the_same_in_every_format(name, edge, first, raw, auxiliary, tmp_path):
    pytest.importorskip('onnxruntime')
    model, images = built(name, edge)
    forward = RawForward(model).eval()
    names = forward.output_names(images)
    assert len(names) == raw
    assert save_onnx(forward, images, tmp_path / 'a.onnx', names) <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of what torch's reader does with buffers
        assert save_exported_program(forward, images, tmp_path / 'a.pt2') <= 1e-4


# What is refused


def test_a_checkpoint_from_before_the_search_ended_is_refused(run):
    message = refused(run, 'epoch_2.pth', '--to', 'onnx')
    assert 'its masks are soft' in message and 'pruned.pth' in message


def test_a_checkpoint_of_before_the_search_is_a_dense_one(run):
    dense = torch.load(run / 'epoch_2.pth', weights_only=False)
    dense['optimizer']['smart']['masks']['state'] = 'dense'
    torch.save(dense, run / 'epoch_1.pth')
    state, _ = read_checkpoint(run / 'epoch_1.pth')
    assert_same_tensors(state, dict(dense['state_dict']))


def test_a_checkpoint_of_another_model_is_refused(run):
    other = stock_config(run)
    other['model']['head']['num_classes'] = 7
    write_config(run / 'config.py', other)
    message = refused(run, 'pruned.pth', '--to', 'checkpoint')
    assert 'a checkpoint of another model' in message
    assert 'head.fc.weight is (10, 64) in the checkpoint and (7, 64) in the model' in message


def test_an_option_of_the_config_can_be_overridden(run):
    message = refused(
        run, 'pruned.pth', '--to', 'checkpoint', '--cfg-options', 'model.head.num_classes=7'
    )
    assert '(7, 64) in the model' in message


def test_a_checkpoint_that_would_run_code_is_refused(run):
    class Evil:
        def __reduce__(self):
            return (print, ('ran',))

    torch.save({'state_dict': {}, 'meta': Evil()}, run / 'evil.pth', pickle_module=pickle)
    assert 'weights_only=True' in refused(run, 'evil.pth', '--to', 'checkpoint')


@pytest.mark.parametrize('content', [[1, 2], {'state_dict': {'a': 1}}])
def test_a_file_that_torch_reads_but_is_no_checkpoint_is_refused(run, content):
    torch.save(content, run / 'strange.pth')
    assert 'strange.pth: it holds' in refused(run, 'strange.pth', '--to', 'checkpoint')


@pytest.mark.parametrize('content', [b'', b'{"a": 1}', pickle.dumps([1, 2])])
def test_a_file_that_is_no_checkpoint_is_refused(run, content):
    (run / 'strange.pth').write_bytes(content)
    assert 'strange.pth' in refused(run, 'strange.pth', '--to', 'checkpoint')


def test_a_missing_file_is_named(run):
    assert 'nowhere.pth: there is no such checkpoint' in refused(
        run, 'nowhere.pth', '--to', 'checkpoint'
    )
    (run / 'pruning.json').unlink()
    assert '--report PRUNING_JSON' in refused(run, 'pruned.pth', '--to', 'blocks')
    (run / 'config.py').unlink()
    assert 'config.py: there is no such config' in refused(run, 'pruned.pth', '--to', 'onnx')


def test_a_config_without_a_model_is_refused(run):
    (run / 'config.py').write_text('sparsity = 0.5\n')
    assert '`model` and `default_scope`' in refused(run, 'pruned.pth', '--to', 'onnx')


def test_a_report_of_another_run_is_refused(run):
    report = json.loads((run / 'pruning.json').read_text())
    report['layers'][0]['name'] = 'backbone.nowhere'
    (run / 'pruning.json').write_text(json.dumps(report))
    assert 'backbone.nowhere' in refused(run, 'pruned.pth', '--to', 'blocks')


def test_meta_of_a_run_checkpoint_is_read(run):
    state, meta = read_checkpoint(run / 'epoch_4.pth')
    assert meta['epoch'] == 4 and 'backbone.conv1.weight' in state
