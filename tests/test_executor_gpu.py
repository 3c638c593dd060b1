"""Tests of mmsmart.executor's kernel for GPUs.

On a machine without one Triton interprets it, on the CPU; where CUDA is in sight the same tests
compile and run it there.
"""

import collections
import copy
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mmsmart.executor import KernelUnavailable, accelerate, choice, forward, gpu, restore, table
from mmsmart.executor.forward import sparse_forwards
from mmsmart.executor.gpu import packings

triton = pytest.importorskip(
    'triton', reason='triton is not installed: torch for CUDA brings it along, on Linux'
)

# Triton's interpreter, of numpy, where a loop's bounds are loaded.
pytestmark = pytest.mark.filterwarnings('ignore:Conversion of an array with ndim > 0')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest
DTYPES = list(TOLERANCES)


@pytest.fixture(scope='module', autouse=True)
def kernel():
    """The kernel as it runs here; interpreted, without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == 'cuda':
            patch.setattr(torch.backends.cudnn, 'allow_tf32', False)
            yield
            return
        patch.setenv('TRITON_INTERPRET', '1')
        _teach_bfloat16(patch)
        gpu.compiled.cache_clear()
        yield
    gpu.compiled.cache_clear()


def _teach_bfloat16(patch):
    """Triton's interpreter multiplies the bits of bfloat16 as integers: give it float32 instead."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    tl, dot = triton.language, builder.create_dot

    def widened(tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        bits = torch.from_numpy(tensor.data.astype('int32')) << 16
        return handle(bits.view(torch.float32).numpy(), tl.float32)

    patch.setattr(
        builder, 'create_dot', lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


@pytest.fixture
def on_gpu(monkeypatch):
    """Let models run through this kernel wherever they are, and measuring be told its outcome."""
    monkeypatch.setitem(forward.KERNELS, 'cpu', gpu)
    monkeypatch.setitem(forward._DTYPES, 'cpu', tuple(DTYPES))

    def say(dense, *sparse):
        monkeypatch.setattr(
            choice,
            '_milliseconds',
            lambda runs, *_: [dense, *sparse, *[1e3] * (len(runs) - 1 - len(sparse))],
        )

    return say


def zero_blocks(weight, block, sparsity):
    """Zero a share of the blocks at random, in place."""
    out, channels, *rest = weight.shape
    grid = -(-out // block[0]), -(-channels // block[1]), *rest
    mask = (torch.rand(grid) >= sparsity).to(weight)
    mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight.data *= mask[:out, :channels]


def assert_as_exact(output, expected):
    """Within what rounding the dtype of the output allows of an answer in float64."""
    assert output.shape == expected.shape
    largest = max(float(expected.abs().max()), 1e-3)
    assert (output - expected).abs().max() <= TOLERANCES[output.dtype] * largest


def exact(layer, images):
    return type(layer).forward(copy.deepcopy(layer).double(), images.double())


@settings(max_examples=30)
@given(st.data())
def test_convolutions_of_any_geometry_answer_as_dense(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 99))
    dtype = data.draw(st.sampled_from(DTYPES))
    kernel, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 3))
    padding, stride = (draw(0, 2), draw(0, 4)), (draw(1, 3), draw(1, 3))
    block = data.draw(st.sampled_from([(16, 8), (16, 16), (64, 32), (8, 8), (16, 1), (5, 3)]))
    weight = torch.randn(draw(1, 70), draw(1, 40), *kernel, device=DEVICE, dtype=dtype)
    zero_blocks(weight, block, data.draw(st.sampled_from([0, 0.5, 0.8, 1])))
    bias = data.draw(st.sampled_from([None, torch.randn(len(weight))]))
    bias = bias if bias is None else bias.to(weight)
    size = [max(1, 1 + d * (k - 1) - 2 * p) for k, d, p in zip(kernel, dilation, padding)]
    images = torch.randn(draw(1, 2), weight.shape[1], size[0] + draw(0, 3), size[1] + draw(0, 4))
    if data.draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    images = images.to(weight)
    expected = F.conv2d(
        images.double(), weight.double(), bias if bias is None else bias.double(),
        stride, padding, dilation,
    )  # fmt: skip
    packed = data.draw(st.sampled_from(packings(weight, bias)))
    output = packed.convolve(
        images, kernel, stride, padding, dilation, channels_last=data.draw(st.booleans())
    )
    assert output.dtype == dtype
    assert_as_exact(output, expected)


@settings(max_examples=10)
@given(
    st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 70),
    st.lists(st.integers(1, 5), max_size=3),
)  # fmt: skip
def test_linear_layers_answer_as_dense(dtype, inputs, outputs, lead):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).to(DEVICE, dtype)
    zero_blocks(layer.weight, (16, 8), 0.6)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(forward.KERNELS, 'cpu', gpu)
        features = torch.randn(*lead, inputs).to(layer.weight)
        assert_as_exact(sparse_forwards(layer)[-1](features), exact(layer, features))


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_row_without_a_block_answers_the_bias(dtype):
    torch.manual_seed(0)
    weight = torch.randn(48, 16, 3, 3).to(DEVICE, dtype)
    weight[16:32] = 0
    bias = torch.randn(48).to(weight)
    for packed in packings(weight, bias):
        output = packed.convolve(
            torch.randn(1, 16, 4, 4).to(weight), [3, 3], [1, 1], [1, 1], [1, 1], channels_last=True
        )
        assert torch.equal(output[0, 16:32], bias[16:32, None, None].expand(16, 4, 4))


def test_over_no_block_at_all_the_answer_is_the_bias():
    weight, bias = torch.zeros(20, 16, 3, 3, device=DEVICE), torch.randn(20, device=DEVICE)
    (packed, *_) = packings(weight, bias)
    images = torch.randn(1, 16, 5, 5, device=DEVICE)
    output = packed.convolve(images, [3, 3], [1, 1], [0, 0], [1, 1], channels_last=False)
    assert packed.density == 0 and len(packed.tiles) == 0
    assert torch.equal(output, bias[None, :, None, None].expand(1, 20, 3, 3))


@pytest.mark.parametrize('channels', [12, 16])
def test_nothing_outside_of_the_images_is_read_or_written(channels):
    weight = torch.randn(20, channels, 3, 3, device=DEVICE)
    images = torch.full((3, channels, 5, 6), torch.nan, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    images[1] = 1
    for packed in packings(weight):
        output = packed.convolve(
            images[1:2], [3, 3], [2, 2], [2, 2], [1, 1], channels_last=True
        )  # fmt: skip
        assert output.isfinite().all()


@pytest.mark.parametrize('channels_last', [False, True])
def test_the_answer_has_the_memory_format_that_was_asked_for(channels_last):
    images = torch.randn(2, 8, 5, 6, device=DEVICE)
    packed = packings(torch.randn(24, 8, 3, 3, device=DEVICE))[0]
    output = packed.convolve(images, [3, 3], [1, 1], [0, 0], [1, 1], channels_last=channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize(
    ('block', 'lanes', 'unit'),
    [((16, 8), 16, 8), ((16, 16), 16, 16), ((32, 32), 32, 32), ((64, 64), 64, 64)],
)
def test_blocks_are_visited_whole_and_nothing_else_is(block, lanes, unit):
    torch.manual_seed(0)
    weight = torch.randn(256, 256, 3, 3).half()
    zero_blocks(weight, block, 0.8)
    packed = packings(weight)[0]
    assert (packed.tiles.shape[2], packed.unit) == (lanes, unit)
    assert packed.tiles.count_nonzero() == weight.count_nonzero()
    assert packed.tiles.numel() <= 1.25 * weight.count_nonzero()  # the ends of rows are filled up
    assert packed.density == float(weight.count_nonzero()) / weight.numel()


def test_where_few_blocks_are_left_in_a_row_tiles_are_no_deeper_than_they():
    weight = torch.block_diag(*[torch.ones(16, 16)] * 4).half()[:, :, None, None]
    assert packings(weight)[0].tiles.shape == (4, 16, 16)


def test_single_input_channels_are_among_what_is_measured_where_they_leave_less():
    torch.manual_seed(0)
    weight = torch.randn(32, 64, 3, 3)
    zero_blocks(weight, (16, 1), 0.9)
    assert 1 in {packed.unit for packed in packings(weight)}
    zero_blocks(weight := torch.randn(32, 64, 3, 3), (16, 8), 0.9)
    assert 1 not in {packed.unit for packed in packings(weight)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, images):
        return self.fc(self.body(self.stem(images).relu()).mean((2, 3)))


@pytest.fixture(params=DTYPES)
def net(request):
    torch.manual_seed(0)
    model = Net().eval().to(DEVICE, request.param)
    zero_blocks(model.body.weight, (16, 8), 0.7)
    zero_blocks(model.fc.weight, (16, 8), 0.5)
    return model


def images_for(model):
    return torch.rand(2, 3, 6, 5).to(model.stem.weight)


def test_an_accelerated_model_answers_the_same(net, on_gpu):
    expected = net(images_for(net) * 0 + 0.5).detach()
    on_gpu(2.0, 3.0, 1.0)  # dense, the first way, the second; the others are slow
    choices = {item.name: item for item in accelerate(net, images_for(net))}
    assert [item.backend for item in choices.values()] == ['dense', 'sparse', 'sparse']
    assert choices['body'].sparse_ms == 1.0 and choices['body'].density < 1
    assert net.body.forward.packed.pixels == packings(net.body.weight)[1].pixels
    with torch.inference_mode():
        assert_as_exact(net(images_for(net) * 0 + 0.5), expected.double())
    restore(net)
    assert 'forward' not in net.body.__dict__


def test_a_layer_that_no_way_makes_faster_stays_dense(net, on_gpu):
    on_gpu(1.0, 1.0, 2.0)
    choices = accelerate(net, images_for(net))
    assert {item.backend for item in choices} == {'dense'}
    assert choices[1].reason == 'sparse is not faster'


def test_without_triton_all_stays_dense_and_the_table_says_so(on_gpu, monkeypatch):
    model = Net().eval().to(DEVICE)
    zero_blocks(model.body.weight, (16, 8), 1)
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.setattr(gpu, 'compiled', gpu.compiled.__wrapped__)
    with pytest.warns(UserWarning, match='stay dense: triton is not installed'):
        choices = accelerate(model, images_for(model))
    assert {item.backend for item in choices} == {'dense'}
    assert 'no kernel on this machine: triton is not installed' in table(choices)


def test_a_triton_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(triton, '__version__', '2.1.0')
    with pytest.raises(KernelUnavailable, match=r'triton 2\.1\.0 is too old'):
        gpu.compiled.__wrapped__()


def test_a_layer_for_which_triton_fails_stays_dense(on_gpu, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError('out of resource: shared memory')

    model = Net().eval().to(DEVICE)
    zero_blocks(model.body.weight, (16, 8), 1)
    monkeypatch.setattr(gpu, 'compiled', lambda: collections.defaultdict(lambda: fails))
    choices = accelerate(model, images_for(model))
    assert choices[1].backend == 'dense'
    assert choices[1].reason == 'no kernel on this machine: Triton failed'


def test_sizes_without_an_answer_are_refused():
    packed = packings(torch.randn(16, 16, 3, 3))[0]
    with pytest.raises(RuntimeError, match='larger than the padded input'):
        packed.convolve(torch.rand(1, 16, 2, 2), [3, 3], [1, 1], [0, 0], [1, 1], False)
    huge = torch.empty(1, 16, 1 << 16, 1 << 16, device='meta')
    with pytest.raises(RuntimeError, match=r'2\*\*31 or more'):
        packed.convolve(huge, [3, 3], [1, 1], [1, 1], [1, 1], True)


@pytest.fixture
def ptx(monkeypatch, tmp_path):
    """What Triton compiles the kernel to, for GPUs that need not be here."""
    if not triton.__version__.startswith('3.6.'):
        pytest.skip('the interface of the compiler differs between versions of triton')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    gpu.compiled()
    kernel = triton.JITFunction(gpu._convolve)
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}

    def compiled(capability, dtype, depth):
        constants = dict(PIXELS=64, LANES=16, DEPTH=depth, UNIT=8, WHOLE=True, channel_step=1)
        pointers = dict.fromkeys(('input', 'tiles', 'output'), f'*{dtype}')
        pointers |= dict(places='*i64', ends='*i32', bias='*fp32')
        types = dict.fromkeys(place, 'i32') | pointers | dict.fromkeys(constants, 'constexpr')
        multiples_of_16 = [*pointers, 'channels', 'out_channels', 'column_step']
        source = ASTSource(
            kernel,
            types,
            {place[name]: value for name, value in constants.items()},
            {place[name]: [['tt.divisibility', 16]] for name in multiples_of_16},
        )
        return triton.compile(source, target=GPUTarget('cuda', capability, 32)).asm['ptx']

    return compiled


@pytest.mark.parametrize(('capability', 'product'), [(80, 'mma.sync'), (90, 'wgmma')])
def test_halves_are_compiled_to_tensor_cores_and_loads_of_16_bytes(ptx, capability, product):
    code = ptx(capability, 'bf16', depth=64)
    assert product in code
    assert len(re.findall(r'cp\.async\.c[ag]\.shared\.global [^;]*, 0x10', code)) >= 4
    assert not re.findall(r'ld\.global\S*\.b16', code)  # nothing is loaded number by number


def test_float32_is_not_rounded_to_tf32(ptx):
    code = ptx(80, 'fp32', depth=16)
    assert 'fma.rn.f32' in code and 'tf32' not in code
