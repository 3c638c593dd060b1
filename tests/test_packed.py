"""Tests of mmsmart.packed: the packed-blocks file and its page in docs/."""

import copy
import json
import math
import re
import stat
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart import install_masks
from mmsmart.export import save_plain_checkpoint
from mmsmart.packed import load_packed, load_packed_meta, save_packed, save_packed_model

PAGE = Path(__file__).parents[1] / 'docs' / 'packed-blocks.md'
KEY = 'mmsmart.packed_blocks'
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The tensor as integers: NaN equals NaN, and -0.0 differs from 0.0."""
    tensor = tensor.detach().contiguous()
    return tensor.dtype, tensor.shape, tensor.view(BITS[tensor.element_size()]).tolist()


def assert_same_bits(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for key in ours:
        assert bits(ours[key]) == bits(theirs[key]), key


class Net(nn.Module):
    """Every kind of layer: ragged, grouped, transposed, depthwise and linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3)
        self.norm = nn.BatchNorm2d(20)
        self.grouped = nn.Conv2d(20, 24, 3, groups=2)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.up = nn.ConvTranspose2d(24, 14, 2, groups=2)
        self.line = nn.Conv1d(14, 9, 3)
        self.fc = nn.Linear(9, 10)


def pruned(model=None, sparsity=0.6, block=(8, 4, 1, 1)):
    torch.manual_seed(0)
    model = model or Net()
    masks = install_masks(model, sparsity, block)
    masks.begin(torch.randn(masks.num_blocks), 0.1)
    masks.harden()
    return model, masks


def rows_of(masks):
    return [
        {
            'name': layer.name,
            'shape': list(layer.weight.shape),
            'block': list(layer.weight_block),
            'groups': layer.groups,
            'blocks_kept': int(kept.sum()),
        }
        for layer, kept in zip(masks.layers, masks.hard_mask().split(masks.plan.layer_sizes))
    ]


def parts(data):
    """Header and body of a safetensors file."""
    (length,) = struct.unpack('<Q', data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(data, change):
    """The same file after `change(header, entry)`, the entry being ours in its metadata."""
    header, body = parts(data)
    entry = json.loads(header['__metadata__'][KEY])
    change(header, entry)
    header['__metadata__'][KEY] = json.dumps(entry)
    header = json.dumps(header).encode()
    return struct.pack('<Q', len(header)) + header + body


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A small file of two packed weights, an alias and a bias, as bytes."""
    path = tmp_path_factory.mktemp('small') / 'small.safetensors'
    fc = torch.eye(4, 6)
    conv = torch.zeros(5, 4, 1, 3, dtype=torch.bfloat16)
    conv[4, 3] = 1
    state = {'fc.weight': fc, 'tied.weight': fc, 'fc.bias': torch.ones(4), 'conv.weight': conv}
    rows = [
        {'name': 'fc', 'shape': [4, 6], 'block': [2, 2], 'groups': 1},
        {'name': 'conv', 'shape': [5, 4, 1, 3], 'block': [2, 3, 1, 2], 'groups': 1},
    ]
    save_packed(state, rows, path, {'classes': ['a', 'b']})
    return path.read_bytes()


# There and back


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]


@st.composite
def cut_weights(draw):
    """A weight of any bits with whole blocks of zeros, and the row that tells how it is cut."""
    dtype = draw(st.sampled_from(DTYPES))
    groups = draw(st.integers(1, 3))
    view = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    block = [draw(st.integers(1, size)) for size in view]
    shape = [groups * view[0], *view[1:]]
    seed = draw(st.integers(0, 2**32 - 1))
    random = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    weight = torch.randint(0, 256, (math.prod(shape) * size,), generator=random, dtype=torch.uint8)
    weight = weight.view(dtype).reshape(groups, *view)
    special = [math.nan, math.inf, -math.inf, -0.0, 0.0] if dtype.is_floating_point else [0] * 5
    special = torch.tensor(special, dtype=dtype)
    where = torch.rand(weight.shape, generator=random) < 0.2
    weight[where] = special[torch.randint(5, (int(where.sum()),), generator=random)]
    kept = draw(st.floats(0, 1))
    for at in np.ndindex(groups, *(-(-size // step) for size, step in zip(view, block))):
        if torch.rand((), generator=random) >= kept:
            box = [slice(i * step, (i + 1) * step) for i, step in zip(at[1:], block)]
            weight[(at[0], *box)] = 0
    return weight.reshape(shape), {'shape': shape, 'block': block, 'groups': groups}


@settings(max_examples=60)
@given(st.lists(cut_weights(), max_size=3), st.booleans())
def test_any_weights_come_back_bit_for_bit(tmp_path_factory, cuts, transposed):
    path = tmp_path_factory.mktemp('random') / 'a.safetensors'
    state = {'steps': torch.tensor(7), 'empty': torch.zeros(0, 3), 'mask': torch.tensor([True])}
    rows = []
    for i, (weight, row) in enumerate(cuts):
        strides = weight.transpose(0, 1).contiguous().transpose(0, 1) if transposed else weight
        state[f'{i}.weight'] = strides
        rows.append({'name': str(i), **row})
    save_packed(state, rows, path)
    assert_same_bits(load_packed(path), state)
    for key, array in page_reader()['dense'](path).items():
        stored = state[key].contiguous()
        assert array.tobytes() == stored.reshape(-1).view(torch.uint8).numpy().tobytes(), key


def test_the_files_of_a_run_are_enough(tmp_path):
    model, masks = pruned()
    save_plain_checkpoint(model, tmp_path / 'pruned.pth')
    report = json.dumps({'layers': rows_of(masks)})
    state = torch.load(tmp_path / 'pruned.pth', weights_only=True)['state_dict']
    save_packed(state, json.loads(report)['layers'], tmp_path / 'run.safetensors')
    assert_same_bits(load_packed(tmp_path / 'run.safetensors'), state)
    fresh = Net()
    fresh.load_state_dict(load_packed(tmp_path / 'run.safetensors'), strict=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_in_memory_gives_the_same_file_as_its_checkpoint(tmp_path, dtype):
    model, masks = pruned()
    model.to(dtype)
    save_packed_model(model, tmp_path / 'model.safetensors', {'epoch': 3})
    save_packed(model.state_dict(), rows_of(masks), tmp_path / 'state.safetensors', {'epoch': 3})
    files = [(tmp_path / f'{name}.safetensors').read_bytes() for name in ('model', 'state')]
    assert files[0] == files[1]
    assert_same_bits(load_packed(tmp_path / 'model.safetensors'), model.state_dict())
    header, _ = parts(files[0])
    (size,) = {item['dtype'] for key, item in header.items() if key.endswith('.blocks')}
    assert size == {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}[dtype]


def test_exactly_the_kept_blocks_are_stored(tmp_path):
    model, masks = pruned()
    save_packed_model(model, tmp_path / 'a.safetensors')
    header, _ = parts((tmp_path / 'a.safetensors').read_bytes())
    for row in rows_of(masks):
        key = f'{row["name"]}.weight'
        assert header[f'{key}.index']['shape'] == [row['blocks_kept']]
        nonzero = model.get_parameter(key) != 0
        assert header[f'{key}.blocks']['shape'] == [int(nonzero.sum())]
        assert key not in header
    assert 0 < sum(row['blocks_kept'] for row in rows_of(masks)) < masks.num_blocks
    assert {'depthwise.weight', 'norm.running_mean', 'fc.bias'} <= set(header)


def test_a_kept_block_of_zeros_is_dropped_and_one_of_negative_zeros_is_not(tmp_path):
    weight = torch.ones(2, 3)
    weight[:, 1], weight[:, 2] = 0.0, -0.0
    row = {'name': '', 'shape': [2, 3], 'block': [2, 1], 'groups': 1, 'blocks_kept': 3}
    save_packed({'weight': weight}, [row], tmp_path / 'a.safetensors')
    _, tensors = page_reader()['read'](tmp_path / 'a.safetensors')
    assert tensors['weight.index'].tolist() == [0, 2]
    assert_same_bits(load_packed(tmp_path / 'a.safetensors'), {'weight': weight})


def test_a_tensor_with_two_names_is_stored_once_and_comes_back_as_one(tmp_path):
    model = Net()
    model.alias, model.norm2 = model.fc, model.norm
    pruned(model)
    save_packed_model(model, tmp_path / 'a.safetensors')
    header, _ = parts((tmp_path / 'a.safetensors').read_bytes())
    assert not [key for key in header if key.startswith(('alias', 'norm2'))]
    loaded = load_packed(tmp_path / 'a.safetensors')
    assert_same_bits(loaded, model.state_dict())
    assert loaded['alias.weight'] is loaded['fc.weight']
    assert loaded['norm2.running_var'] is loaded['norm.running_var']


def test_a_weight_is_packed_under_the_name_of_its_row_whichever_name_comes_first(tmp_path):
    weight = torch.eye(4)
    row = {'name': 'fc', 'shape': [4, 4], 'block': [2, 2], 'groups': 1}
    save_packed({'alias': weight, 'fc.weight': weight}, [row], tmp_path / 'a.safetensors')
    header, _ = parts((tmp_path / 'a.safetensors').read_bytes())
    assert sorted(header) == ['__metadata__', 'fc.weight.blocks', 'fc.weight.index']
    assert sorted(load_packed(tmp_path / 'a.safetensors')) == ['alias', 'fc.weight']


def test_parts_of_one_tensor_are_stored_each_on_its_own(tmp_path):
    whole = torch.arange(12.0)
    state = {'a': whole[:8], 'b': whole[4:], 'c': whole.view(3, 4), 'd': whole}
    save_packed(state, [], tmp_path / 'a.safetensors')
    assert_same_bits(load_packed(tmp_path / 'a.safetensors'), state)


def test_meta_comes_back_plain(tmp_path):
    meta = {'dataset_meta': {'classes': ('a',)}, 'score': math.nan, 'at': np.float32(0.5)}
    save_packed({'a': torch.ones(2)}, [], tmp_path / 'a.safetensors', meta)
    assert load_packed_meta(tmp_path / 'a.safetensors') == {
        'dataset_meta': {'classes': ['a']}, 'score': None, 'at': 0.5,
    }  # fmt: skip


def test_loaded_tensors_outlive_the_file(tmp_path):
    model, _ = pruned()
    save_packed_model(model, tmp_path / 'a.safetensors')
    loaded = load_packed(tmp_path / 'a.safetensors')
    (tmp_path / 'a.safetensors').write_bytes(bytes((tmp_path / 'a.safetensors').stat().st_size))
    assert_same_bits(loaded, model.state_dict())


# Size and layout


def test_the_size_of_the_file_follows_the_kept_share(tmp_path):
    def net():
        widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)]
        return nn.Sequential(*(nn.Conv2d(*pair, 3) for pair in widths))

    dense = tmp_path / 'dense.safetensors'
    save_packed(net().state_dict(), [], dense)
    shares = {}
    for sparsity in (0.5, 0.8, 0.9):
        save_packed_model(pruned(net(), sparsity, (16, 8, 1, 1))[0], tmp_path / 'a.safetensors')
        shares[sparsity] = (tmp_path / 'a.safetensors').stat().st_size / dense.stat().st_size
    # The rest is the index (4 bytes for 512), the biases and the header.
    for sparsity, share in shares.items():
        assert 1 - sparsity < share < 1 - sparsity + 0.02
    assert shares[0.8] < 0.25


def test_tensors_start_at_a_multiple_of_their_elements(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.uint8):
        state = {f'{i}.weight': torch.ones(3, 5, dtype=dtype) for i in range(3)}
        rows = [{'name': str(i), 'shape': [3, 5], 'block': [2, 2], 'groups': 1} for i in range(3)]
        save_packed({**state, 'odd': torch.ones(3, dtype=torch.uint8)}, rows, tmp_path / 'a.st')
        data = (tmp_path / 'a.st').read_bytes()
        header, body = parts(data)
        assert (len(data) - len(body)) % 8 == 0
        for name, item in header.items():
            if name != '__metadata__' and item['data_offsets'] != [0, 0]:
                start, end = item['data_offsets']
                assert start % ((end - start) // math.prod(item['shape'])) == 0


def test_a_file_can_be_read_by_whoever_may_read_its_neighbours(tmp_path):
    (tmp_path / 'plain').write_text('')
    save_packed({}, [], tmp_path / 'a.safetensors')
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(Path, 'write_bytes', fail)
    with pytest.raises(OSError, match='disk full'):
        save_packed({}, [], tmp_path / 'a.safetensors')
    assert list(tmp_path.iterdir()) == []


# The page


def page_reader():
    names = {}
    for block in re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), flags=re.M | re.S):
        if 'def ' in block:
            assert 'torch' not in block and 'mmsmart import' not in block
            exec(block, names)
    return names


def test_the_reader_on_the_page_gives_the_dense_weights(tmp_path):
    model, _ = pruned()
    model.line.half()
    save_packed_model(model, tmp_path / 'a.safetensors')
    arrays, state = page_reader()['dense'](tmp_path / 'a.safetensors'), model.state_dict()
    assert sorted(arrays) == sorted(state)
    for key, array in arrays.items():
        assert array.dtype == state[key].numpy().dtype
        assert array.shape == state[key].shape
        assert array.tobytes() == state[key].contiguous().numpy().tobytes()


def test_the_product_on_the_page_is_that_of_the_dense_layer(tmp_path):
    model, _ = pruned(nn.Linear(37, 21).double())
    save_packed_model(model, tmp_path / 'a.safetensors')
    names = page_reader()
    entry, tensors = names['read'](tmp_path / 'a.safetensors')
    x = torch.randn(5, 37, dtype=torch.float64)
    y = names['linear'](
        x.numpy(), entry['weights']['weight'], tensors['weight.blocks'], tensors['weight.index']
    )
    torch.testing.assert_close(torch.from_numpy(y), x @ model.weight.detach().T)


def test_the_worked_example_gives_the_numbers_and_the_header_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    (example,) = re.findall(r'^```python\n(weight = .*?)^```', text, flags=re.M | re.S)
    exec(example, {'torch': torch, 'save_packed': save_packed})
    header, _ = parts(Path('example.safetensors').read_bytes())
    (shown,) = re.findall(r'^```json\n(.*?)^```', text, flags=re.M | re.S)
    assert json.loads(shown) == header
    _, tensors = page_reader()['read']('example.safetensors')
    for name in ('fc.weight.index', 'fc.weight.blocks'):
        (numbers,) = re.findall(rf'^    {name} +(.*)$', text, flags=re.M)
        assert tensors[name].tolist() == [float(number) for number in numbers.split()]


def test_the_first_example_on_the_page_runs_in_the_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, masks = pruned()
    save_plain_checkpoint(model, 'pruned.pth')
    Path('pruning.json').write_text(json.dumps({'layers': rows_of(masks)}))
    names = {}
    (example,) = re.findall(
        r'^```python\n(import json\n.*?pruning.json.*?)^```', PAGE.read_text(), re.M | re.S
    )
    exec(example, names)
    assert_same_bits(names['dense'], model.state_dict())


def test_block_22_on_the_page_is_where_the_page_says(tmp_path):
    for groups, grid in [(1, (1, 2, 2, 3, 3)), (2, (2, 1, 1, 3, 3))]:
        assert str(grid) in PAGE.read_text()
        weight = torch.zeros(32, 16 // groups, 3, 3)
        if groups == 1:
            weight[16:32, 0:8, 1, 1] = 1
        row = {'name': '', 'shape': list(weight.shape), 'block': [16, 8, 1, 1], 'groups': groups}
        save_packed({'weight': weight}, [row], tmp_path / 'a.st')
        _, tensors = page_reader()['read'](tmp_path / 'a.st')
        assert tensors['weight.index'].tolist() == ([22] if groups == 1 else [])


# What is refused on the way out


ROW = {'name': 'fc', 'shape': [4, 6], 'block': [2, 2], 'groups': 1}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'name': 'gc'}, r'rows\[0\] \(gc\): no gc.weight in the state dict'),
        ({'name': None}, r'rows\[0\]: expected an entry with a name'),
        ({'shape': [6, 4]}, r'rows\[0\] \(fc\).shape: \(6, 4\), but fc.weight has \(4, 6\)'),
        ({'shape': [4]}, r'shape: expected 2 to 5 integers'),
        ({'block': [2, 0]}, r'block: expected 2 to 5 integers'),
        ({'block': [2, True]}, r'block: expected 2 to 5 integers'),
        ({'block': [2, 7]}, r'block: expected at most \(4, 6\), got \(2, 7\)'),
        ({'block': [2, 2, 1]}, r'block: expected at most \(4, 6\)'),
        ({'block': [4, 2], 'groups': 2}, r'block: expected at most \(2, 6\)'),
        ({'groups': 3}, r'groups: expected a divisor of 4, got 3'),
        ({'groups': None}, r'groups: expected a divisor of 4, got None'),
        ({'blocks_kept': 3}, r'fc.weight has 6 blocks that are not zero.*blocks_kept: 3'),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_packed({'fc.weight': torch.ones(4, 6)}, [{**ROW, **change}], tmp_path / 'a.st')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('state', 'rows', 'message'),
    [
        ({'x': 'text'}, [], 'x: expected a dense tensor, got str'),
        ({'x': torch.eye(2).to_sparse()}, [], 'x: expected a dense tensor'),
        ({'x': torch.zeros(2, device='meta')}, [], 'x: expected a dense tensor'),
        ({'x': torch.zeros(2, dtype=torch.complex128)}, [], 'x: safetensors has no dtype'),
        ({'fc.weight': torch.ones(4, 6)}, [ROW, ROW], r'rows\[1\] \(fc\): the row is there twice'),
        (
            {'fc.weight': torch.ones(4, 6), 'fc.weight.index': torch.ones(1)},
            [ROW],
            'fc.weight.index is the name that fc.weight is packed under',
        ),
    ],
)
def test_a_state_dict_that_cannot_be_stored_is_named(tmp_path, state, rows, message):
    with pytest.raises(ValueError, match=message):
        save_packed(state, rows, tmp_path / 'a.safetensors')
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_hard_masks_is_refused(tmp_path):
    with pytest.raises(ValueError, match='Linear has no masks'):
        save_packed_model(nn.Linear(4, 4), tmp_path / 'a.safetensors')
    model = nn.Linear(4, 4)
    install_masks(model, 0.5, (2, 2))
    with pytest.raises(RuntimeError, match='the masks are dense, not hard'):
        save_packed_model(model, tmp_path / 'a.safetensors')


def test_a_missing_library_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    for call in (lambda path: save_packed({}, [], path), load_packed):
        with pytest.raises(ImportError, match='pip install safetensors'):
            call(tmp_path / 'a.safetensors')


# What is refused on the way in


def assert_refused(tmp_path, data, message, **options):
    path = tmp_path / 'bad.safetensors'
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as failure:
        load_packed(path, **options)
    assert str(path) in str(failure.value)


@pytest.mark.parametrize('cut', [0, 3, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, small, cut):
    assert_refused(tmp_path, small[:cut], 'not a readable safetensors file')


def test_a_safetensors_file_of_others_is_refused(tmp_path):
    from safetensors.torch import save

    assert_refused(tmp_path, save({'a': torch.ones(2)}), f'no {KEY}')
    assert_refused(tmp_path, save({'a': torch.ones(2)}, {'format': 'pt'}), f'no {KEY}')
    assert_refused(tmp_path, save({'a': torch.ones(2)}, {KEY: '{'}), 'not JSON')
    assert_refused(tmp_path, save({'a': torch.ones(2)}, {KEY: '[' * 10**5}), 'not JSON')
    assert_refused(tmp_path, save({'a': torch.ones(2)}, {KEY: '1'}), 'version')


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / 'nothing.safetensors')


def rename(old, new):
    def change(header, entry):
        header[new] = header.pop(old)

    return change


def put(*path, value):
    def change(header, entry):
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value

    return change


def retype(name, dtype, shape):
    def change(header, entry):
        header[name].update(dtype=dtype, shape=shape)

    return change


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (put('version', value=2), 'version: this reader knows 1, the file has 2'),
        (put('version', value=True), 'version'),
        (put('weights', value=[]), 'weights: expected an object'),
        (put('aliases', value=None), 'aliases: expected an object'),
        (put('meta', value='x'), 'meta: expected an object'),
        (put('weights', 'fc.weight', value=None), r"weights\['fc.weight'\]: expected shape"),
        (put('weights', 'fc.weight', 'shape', value=[4, 2**40]), 'fc.weight.*shape: expected'),
        (put('weights', 'fc.weight', 'shape', value=[1] * 99), 'fc.weight.*shape: expected'),
        (put('weights', 'fc.weight', 'shape', value=[4, 5.0]), 'fc.weight.*shape: expected'),
        (put('weights', 'fc.weight', 'shape', value=[4, 4]), 'fc.weight.index: expected indices'),
        (put('weights', 'fc.weight', 'block', value=[2, 1]), 'fc.weight.blocks: the 2 blocks'),
        (put('weights', 'fc.weight', 'block', value=[5, 2]), 'fc.weight.*block: expected at most'),
        (put('weights', 'fc.weight', 'groups', value=0), 'fc.weight.*groups: expected a divisor'),
        (put('weights', 'ghost', value=ROW), 'ghost.blocks: expected a vector, got nothing'),
        (rename('fc.weight.index', 'i'), 'fc.weight.index: expected a vector, got nothing'),
        (rename('fc.bias', 'fc.weight'), 'fc.weight: the file holds it packed and dense'),
        (rename('fc.bias', 'tied.weight'), r"aliases\['tied.weight'\]: expected a new name"),
        (put('aliases', 'other', value='ghost'), r"aliases\['other'\]"),
        (put('aliases', 'other', value=['fc.bias']), r"aliases\['other'\]"),
        (put('aliases', 'other', value='tied.weight'), r"aliases\['other'\]"),
        (retype('fc.weight.blocks', 'F32', [4, 2]), r'fc.weight.blocks: .*got shape \(4, 2\)'),
        (retype('fc.weight.index', 'F32', [2]), 'fc.weight.index: expected dtype torch.int32'),
        (retype('fc.weight.blocks', 'F64', [4]), 'fc.weight.blocks: the 2 blocks .* hold 8'),
        (retype('fc.weight.blocks', 'F32', [9]), 'not a readable safetensors file'),
    ],
)
def test_a_header_that_departs_from_the_page_is_refused(tmp_path, small, change, message):
    assert_refused(tmp_path, with_header(small, change), message)


@pytest.mark.parametrize(
    ('index', 'message'),
    [
        ((0, 0), 'ascending'),
        ((4, 0), 'ascending'),
        ((-1, 4), r'expected indices in \[0, 6\), got -1 to 4'),
        ((0, 6), r'expected indices in \[0, 6\), got 0 to 6'),
        ((-(2**31), 2**31 - 1), r'expected indices in \[0, 6\)'),
    ],
)
def test_an_index_that_is_not_ascending_inside_the_grid_is_refused(tmp_path, small, index, message):
    header, body = parts(small)
    start, _ = header['fc.weight.index']['data_offsets']
    at = len(small) - len(body) + start
    assert small[at : at + 8] == struct.pack('<2i', 0, 4)
    data = small[:at] + struct.pack('<2i', *index) + small[at + 8 :]
    assert_refused(tmp_path, data, f'fc.weight.index: .*{message}')


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    """A weight without a kept block is all shape: 300 bytes that stand for four gigabytes."""
    path = tmp_path / 'a.safetensors'
    row = {'name': '', 'shape': [4, 4], 'block': [1, 1], 'groups': 1}
    save_packed({'weight': torch.zeros(4, 4)}, [row], path)

    def grow(header, entry):
        entry['weights']['weight']['shape'] = [2**15, 2**15]

    assert_refused(
        tmp_path, with_header(path.read_bytes(), grow), r'4,294,967,296 bytes.*67,108,864'
    )

    def ragged(header, entry):
        entry['weights']['weight'] = {'shape': [2**12 + 1] * 2, 'block': [2**12] * 2, 'groups': 1}

    assert_refused(tmp_path, with_header(path.read_bytes(), ragged), '268,435,456 bytes')
    assert load_packed(path, max_bytes=64)['weight'].shape == (4, 4)
    assert_refused(tmp_path, path.read_bytes(), 'max_bytes = 63', max_bytes=63)


def test_a_network_that_keeps_next_to_nothing_loads_when_asked_to(tmp_path):
    state = {'weight': torch.zeros(5000, 5000)}
    state['weight'][0, 0] = 1
    row = {'name': '', 'shape': [5000, 5000], 'block': [500, 500], 'groups': 1}
    save_packed(state, [row], tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='max_bytes'):
        load_packed(tmp_path / 'a.safetensors', max_bytes=10**8 - 1)
    loaded = load_packed(tmp_path / 'a.safetensors', max_bytes=10**8)
    assert torch.equal(loaded['weight'], state['weight'])


def assert_read_or_refused(folder, data):
    path = folder / 'fuzz.safetensors'
    path.write_bytes(data)
    try:
        load_packed(path)
    except ValueError as error:
        assert str(path) in str(error)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(0, 2**16)),
)
def test_damaged_bytes_are_refused_or_read_but_never_crash(tmp_path_factory, small, damage, end):
    data = bytearray(small)
    for position, value in damage:
        data[position % len(data)] = value
    if end is not None:
        data = data[: end % len(data)]
    assert_read_or_refused(tmp_path_factory.getbasetemp(), bytes(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        *[(key,) for key in ('version', 'weights', 'aliases', 'meta')],
        *[('weights', f'{name}.weight') for name in ('fc', 'conv')],
        *[
            ('weights', f'{name}.weight', field)
            for name in ('fc', 'conv')
            for field in ('shape', 'block', 'groups')
        ],
        ('aliases', 'tied.weight'),
    ]
)
sizes = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 6, 24, 2**31 - 1, 2**63]), max_size=6)


@settings(max_examples=150)
@given(fields, json_values | sizes | st.sampled_from(['fc.bias', 0, 2, 5, 2**64]))
def test_any_field_with_any_value_is_refused_or_read(tmp_path_factory, small, field, value):
    assert_read_or_refused(
        tmp_path_factory.getbasetemp(), with_header(small, put(*field, value=value))
    )


def test_the_undamaged_file_of_these_tests_is_read(tmp_path, small):
    path = tmp_path / 'whole.safetensors'
    for data in (small, with_header(small, lambda header, entry: None)):
        path.write_bytes(data)
        assert set(load_packed(path)) >= {'fc.weight', 'conv.weight', 'tied.weight'}
    kept = copy.deepcopy(parts(small)[0])
    assert kept['conv.weight.index']['shape'] == [2]
