"""Tests of mmsmart.executor: who runs over kept blocks, and that answers stay those of dense."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsmart import install_masks, remove_masks
from mmsmart.executor import KernelUnavailable, accelerate, choice, kernel, restore, table
from mmsmart.executor.forward import SparseForward, sparse_forwards
from mmsmart.executor.kernel import pack


@pytest.fixture(scope='module')
def compiled():
    try:
        return kernel.compiled()
    except KernelUnavailable as error:
        pytest.skip(f'the kernel can not be compiled here: {error}')


@pytest.fixture
def measured(monkeypatch):
    """Let the measurement say what it is told to: dense and sparse milliseconds."""

    def say(dense, sparse):
        monkeypatch.setattr(choice, '_milliseconds', lambda *args: [dense, sparse])

    return say


def zero_blocks(weight, block, sparsity):
    """Zero a share of the blocks at random, in place."""
    out, channels, *rest = weight.shape
    grid = -(-out // block[0]), -(-channels // block[1]), *rest
    mask = (torch.rand(grid) >= sparsity).float()
    mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight.data *= mask[:out, :channels]


def only_forward(layer):
    """The kernel for CPUs has one way to run a layer."""
    (forward,) = sparse_forwards(layer)
    return forward


def exact(layer, images):
    """The layer's answer in float64."""
    return type(layer).forward(copy.deepcopy(layer).double(), images.double())


def assert_as_dense(forward, images):
    output, expected = forward(images), exact(forward.layer, images)
    assert output.shape == expected.shape and output.dtype == torch.float32
    assert (output - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-3)


def runs_sparse(model):
    return [name for name, m in model.named_modules() if 'forward' in m.__dict__]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.fc = nn.Linear(48, 10)

    def forward(self, images):
        return self.fc(self.body(self.stem(images).relu()).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    zero_blocks(model.body.weight, (16, 8), 0.7)
    zero_blocks(model.fc.weight, (16, 8), 0.5)
    return model


IMAGES = torch.rand(2, 3, 12, 10)


@settings(max_examples=80)
@given(st.data())
def test_convolutions_of_any_geometry_answer_as_dense(compiled, data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 99))
    size, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 2), draw(1, 3))
    layer = nn.Conv2d(
        draw(1, 40), draw(1, 40), size, (draw(1, 3), draw(1, 3)),
        data.draw(st.sampled_from(['valid', (0, 0), (1, 1), (0, 3), (5, 2)])),
        dilation, bias=data.draw(st.booleans()),
    )  # fmt: skip
    zero_blocks(layer.weight, (draw(1, 20), draw(1, 20)), data.draw(st.sampled_from([0, 0.8, 1])))
    shape = [1 + d * (k - 1) + draw(0, 12) for k, d in zip(size, dilation)]
    images = torch.randn(draw(1, 3), layer.in_channels, *shape)
    with torch.inference_mode():
        forward = only_forward(layer)
        assert_as_dense(forward, images)
        assert_as_dense(forward, images.contiguous(memory_format=torch.channels_last))
        assert_as_dense(forward, images.transpose(2, 3).contiguous().transpose(2, 3))


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.lists(st.integers(1, 9), max_size=3))
def test_linear_layers_answer_as_dense(compiled, inputs, outputs, lead):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    zero_blocks(layer.weight, (16, 8), 0.6)
    with torch.inference_mode():
        assert_as_dense(only_forward(layer), torch.randn(*lead, inputs))


@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('batch', [1, 2, 7])
def test_threads_and_batches_do_not_change_the_answer(compiled, threads, batch):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding='same')
    zero_blocks(layer.weight, (16, 16), 0.8)
    images = torch.randn(batch, 64, 40, 41)
    with torch.inference_mode():
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            assert_as_dense(only_forward(layer), images)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize('weight_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('image_format', [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_of_the_answer_is_that_of_dense(compiled, weight_format, image_format):
    layer = nn.Conv2d(8, 24, 3).to(memory_format=weight_format)
    images = torch.rand(2, 8, 9, 7).contiguous(memory_format=image_format)
    with torch.inference_mode():
        forward = only_forward(layer)
        assert forward(images).stride() == forward.dense(images).stride()


def test_only_what_is_left_is_stored():
    weight = torch.randn(64, 64, 3, 3)
    zero_blocks(weight, (16, 16), 0.8)
    packed = pack(weight)
    assert packed.units.numel() == weight.count_nonzero()
    assert packed.density == float(weight.count_nonzero()) / weight.numel()
    assert packed.units.shape[1] == 8


def test_blocks_of_single_input_channels_are_not_filled_up():
    weight = torch.randn(32, 64, 3, 3)
    zero_blocks(weight, (16, 1), 0.8)
    packed = pack(weight)
    assert packed.units.shape[1] == 1
    assert packed.units.numel() == weight.count_nonzero()


def test_the_faster_of_both_is_chosen(compiled, net, measured):
    measured(dense=2.0, sparse=1.0)
    choices = {item.name: item for item in accelerate(net, IMAGES)}
    assert runs_sparse(net) == ['body', 'fc']
    assert choices['stem'].reason == 'no block of the weight is zero'
    assert (choices['body'].dense_ms, choices['body'].sparse_ms) == (2.0, 1.0)
    measured(dense=1.0, sparse=2.0)
    assert {item.backend for item in accelerate(net, IMAGES)} == {'dense'}
    assert runs_sparse(net) == []


def test_a_layer_with_few_blocks_left_is_found_to_be_faster(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1)).eval()
    zero_blocks(model[0].weight, (16, 16), 0.95)
    (item,) = accelerate(model, torch.rand(1, 256, 14, 14))
    assert item.backend == 'sparse' and item.sparse_ms < item.dense_ms


def test_an_accelerated_model_answers_the_same_and_keeps_its_state(compiled, net, measured):
    expected, state = net(IMAGES), copy.deepcopy(net.state_dict())
    measured(dense=2.0, sparse=1.0)
    accelerate(net, IMAGES)
    with torch.inference_mode():
        torch.testing.assert_close(net(IMAGES), expected.detach(), rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[key], state[key]) for key in state)
    restore(net)
    assert runs_sparse(net) == []
    assert torch.equal(net(IMAGES), expected)


def test_every_call_of_a_shared_layer_counts(compiled, measured):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(16, 16, 1)

        def forward(self, *levels):
            return [self.head(level) for level in levels]

    model = Pyramid().eval()
    zero_blocks(model.head.weight, (16, 8), 1)
    measured(dense=2.0, sparse=1.0)
    small, large = torch.rand(1, 16, 4, 4), torch.rand(1, 16, 8, 8)
    (item,) = accelerate(model, (small, large, large))
    assert (item.dense_ms, item.sparse_ms) == (6.0, 3.0)


def test_a_wrong_answer_keeps_the_layer_dense(compiled, net, measured, monkeypatch):
    measured(dense=2.0, sparse=1.0)
    run = SparseForward._run
    monkeypatch.setattr(
        SparseForward, '_run', lambda *args, **options: 1.001 * run(*args, **options)
    )
    choices = {item.name: item for item in accelerate(net, IMAGES)}
    assert runs_sparse(net) == []
    assert choices['body'].reason.startswith('the outputs would differ')


def test_gradients_other_dtypes_and_tracing_go_through_the_dense_layer(compiled, net, measured):
    measured(dense=2.0, sparse=1.0)
    accelerate(net, IMAGES)
    dense = copy.deepcopy(net)
    restore(dense)
    net(IMAGES).sum().backward()
    dense(IMAGES).sum().backward()
    assert torch.equal(net.body.weight.grad, dense.body.weight.grad)
    exported = torch.export.export(net, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), dense(IMAGES))
    double = copy.deepcopy(net).double()
    assert torch.equal(double(IMAGES.double()), dense.double()(IMAGES.double()))


def test_changed_weights_are_never_answered_with_the_old_ones(compiled, net, measured):
    measured(dense=2.0, sparse=1.0)
    accelerate(net, IMAGES)
    other = Net().eval()
    net.load_state_dict(other.state_dict())
    with torch.inference_mode(), pytest.warns(UserWarning, match='Call accelerate again'):
        assert torch.equal(net(IMAGES), other(IMAGES))
    with torch.inference_mode(), pytest.warns(UserWarning, match='Call accelerate again'):
        assert torch.equal(copy.deepcopy(net)(IMAGES), other(IMAGES))


@pytest.mark.parametrize(
    ('layer', 'reason'),
    [
        (nn.Conv2d(16, 16, 3, groups=2), '2 groups'),
        (nn.Conv2d(16, 16, 3, padding_mode='reflect', padding=1), 'reflect'),
        pytest.param(
            nn.Conv2d(16, 16, 2, padding='same'),
            'differs from one side',
            marks=pytest.mark.filterwarnings('ignore:Using padding'),
        ),
        (nn.Conv2d(16, 16, 3).double(), 'float64'),
        (nn.Conv2d(16, 16, 3).bfloat16(), 'takes torch.float32'),
        (type('WSConv', (nn.Conv2d,), {'forward': lambda self, x: x})(16, 16, 3), 'WSConv'),
    ],
)
def test_what_the_kernel_does_not_cover_stays_dense_and_says_why(layer, reason):
    layer.weight.data.zero_()
    (item,) = accelerate(layer.eval(), torch.rand(1, 16, 8, 8, dtype=layer.weight.dtype))
    assert item.backend == 'dense' and reason in item.reason


def test_a_layer_that_is_not_reached_stays_dense(compiled, net):
    model = nn.ModuleDict({'used': nn.Linear(8, 8), 'idle': nn.Linear(16, 16)}).eval()
    zero_blocks(model['idle'].weight, (16, 8), 1)
    model.forward = lambda features: model['used'](features)
    assert 'do not reach it' in accelerate(model, torch.rand(2, 8))[1].reason


def test_a_parametrised_weight_stays_dense(net):
    nn.utils.parametrizations.weight_norm(net.body)
    choices = {item.name: item for item in accelerate(net, IMAGES)}
    assert 'parametrization' in choices['body'].reason


def test_hard_masks_are_skipped_whether_removed_or_not(compiled, measured):
    torch.manual_seed(0)
    model = Net().eval()
    masks = install_masks(model, 0.6, (16, 8, 1, 1))
    masks.begin(torch.randn(masks.num_blocks), 0.1)
    masks.harden()
    expected = model(IMAGES).detach()
    measured(dense=2.0, sparse=1.0)
    for step in (lambda: None, lambda: remove_masks(model)):
        step()
        accelerate(model, IMAGES)
        assert runs_sparse(model)
        with torch.inference_mode():
            torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_all_stays_dense_with_a_message(net, monkeypatch):
    expected = net(IMAGES)
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setattr(kernel, 'compiled', kernel.compiled.__wrapped__)
    with pytest.warns(UserWarning, match="'no-such-compiler' is not on the PATH"):
        choices = accelerate(net, IMAGES)
    assert {item.backend for item in choices} == {'dense'}
    assert choices[0].reason == 'no kernel on this machine: no C++ compiler'
    assert torch.equal(net(IMAGES), expected)


@pytest.mark.parametrize(
    ('model', 'rounds', 'error', 'message'),
    [
        (lambda x: x, 3, TypeError, 'model: expected a torch.nn.Module'),
        (nn.Linear(4, 4).train(), 3, ValueError, r'Call model\.eval\(\)'),
        (nn.Linear(4, 4).eval(), 0, ValueError, 'rounds: expected an integer of at least 1'),
    ],
)
def test_bad_input_is_named(model, rounds, error, message):
    with pytest.raises(error, match=message):
        accelerate(model, torch.rand(1, 4), rounds)


def test_the_table_has_a_row_for_every_layer_and_their_sum(compiled, net, measured):
    measured(dense=2.0, sparse=1.0)
    rows = table(accelerate(net, IMAGES)).splitlines()
    assert [row.split('|')[1].strip() for row in rows[2:-1]] == ['stem', 'body', 'fc']
    assert '| 4.000 | 2.000 | 2.00 |' in rows[-1]


def test_importing_compiles_nothing():
    script = 'import sys, mmsmart.executor; sys.exit("torch.utils.cpp_extension" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', script], timeout=120).returncode == 0


def test_over_no_block_at_all_the_answer_is_the_bias(compiled):
    layer = nn.Conv2d(16, 20, 3)
    layer.weight.data.zero_()
    with torch.inference_mode():
        output = only_forward(layer)(torch.rand(1, 16, 5, 5))
        assert torch.equal(output, layer.bias[:, None, None].expand_as(output))
