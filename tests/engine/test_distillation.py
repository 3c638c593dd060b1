"""With `smart.distillation`, the pruned network stays near the dense one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.ranks import train_on
from engine.runs import merged, pruned_weights, smart_config, train
from engine.test_resume import ACCUMULATION, DROPOUT, EMA, assert_resumes, run_of
from engine.tiny_sets import upstream_config
from mmsmart import install_masks
from mmsmart.engine import SmartAmpOptimWrapper, SmartOptimWrapper
from mmsmart.engine.distillation import (
    TEACHERS,
    DenseFeatures,
    DenseOutputs,
    feature_distance,
    read_distillation,
)
from mmsmart.engine.export import load_model

WEIGHT = 3.0
DETR = 'detr/detr_r50_8xb2-150e_coco.py'
DISTILLED = dict(distillation=dict(weight=WEIGHT, of='features'))
OUTPUTS = dict(distillation=dict(weight=0.01, of='outputs'))  # of a network hardly trained


class Backbone(nn.Module):
    """Gives two feature maps, and indices that are none; overwrites the first one on the way."""

    def __init__(self, dropout=0.0, recomputed=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.rest = nn.Conv2d(8, 8, 2)
        self.dropout, self.recomputed = nn.Dropout(dropout), recomputed

    def forward(self, images):
        early = self.norm(self.stem(images)).relu_()
        rest = (
            checkpoint(self.rest, early, use_reentrant=False)
            if self.recomputed
            else self.rest(early)
        )
        return dict(early=early, late=(self.dropout(rest), images.argmax(1)))


class Network(BaseModel):
    def __init__(self, **backbone):
        super().__init__()
        self.backbone, self.head = Backbone(**backbone), nn.Linear(8, 4)

    def forward(self, inputs, mode='loss'):
        features = self.backbone(inputs.clone())
        scores = self.head(features['late'][0].mean((2, 3)))
        return scores if mode == 'tensor' else dict(loss=scores.square().mean())


def network(**backbone):
    generator = torch.Generator().manual_seed(0)
    model = Network(**backbone).double()
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def batch(seed=0):
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).double()
    return dict(inputs=images)


def searching(
    weight=WEIGHT,
    wrapper_type=SmartOptimWrapper,
    model=None,
    lr=0.05,
    of='features',
    **settings,
):
    """A small model in the middle of a search, its wrapper and the model that it was."""
    model = network() if model is None else model
    dense = copy.deepcopy(model)
    masks = install_masks(model, sparsity=0.5, block=(2, 2, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    wrapper = wrapper_type(optimizer=optimizer, **settings)
    teacher = TEACHERS[of](model, weight) if weight else None
    wrapper.attach(masks, teacher)
    if teacher:
        teacher.begin()
    masks.begin(torch.randn(masks.num_blocks, generator=torch.Generator().manual_seed(2)), 1.0)
    return model, wrapper, dense


def distance_by_hand(model, dense, images, of='features'):
    dense = dense.eval()
    with torch.no_grad():
        early = dense.backbone.norm(dense.backbone.stem(images)).relu()
        wanted = early, dense.backbone.rest(early)
        scores = dense.head(wanted[1].mean((2, 3)))
    features = model.backbone(images.clone())
    given = features['early'], features['late'][0]
    if of == 'outputs':
        difference = model.head(given[1].mean((2, 3))) - scores
        return (difference**2).sum() / (scores**2).sum()
    ratios = [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(given, wanted)]
    return sum(ratios) / 2


def gradients_of_a_step(model, wrapper, images):
    """What backward leaves on the parameters, before anything is stepped."""
    wrapper.step = lambda **kwargs: None
    wrapper.zero_grad = lambda **kwargs: None
    model.train_step(images, wrapper)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize('of', TEACHERS)
@pytest.mark.parametrize('recomputed', [False, True])
def test_gradient_is_that_of_the_loss_and_the_weighted_distance(recomputed, of):
    model, wrapper, dense = searching(model=network(recomputed=recomputed), of=of)
    images = batch()['inputs']
    loss = model.train()(images)['loss'] + WEIGHT * distance_by_hand(model, dense, images, of)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for given, wanted in zip(gradients_of_a_step(model, wrapper, batch()), expected):
        torch.testing.assert_close(given, wanted)


def test_without_distillation_a_step_is_that_of_the_loss_alone():
    model, wrapper, _ = searching(weight=None)
    expected = torch.autograd.grad(
        model.train()(batch()['inputs'])['loss'], list(model.parameters())
    )
    given = gradients_of_a_step(model, wrapper, batch())
    assert all(torch.equal(one, other) for one, other in zip(given, expected))


@pytest.mark.parametrize('of', TEACHERS)
def test_forward_passes_of_a_step_count_the_same(of):
    model, wrapper, dense = searching(of=of)
    with wrapper.optim_context(model):
        for seed in range(3):
            model(**batch(seed))
        with torch.no_grad():
            model(**batch(3))  # such as a teacher's: not what is trained
    given = wrapper.distillation.distance()
    each = [distance_by_hand(model, dense, batch(seed)['inputs'], of) for seed in range(3)]
    torch.testing.assert_close(given, sum(each) / 3)


def test_half_of_a_batch_counts_half():
    model, wrapper, _ = searching(accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 2)
    halves = gradients_of_a_step(model, wrapper, batch())
    model, wrapper, _ = searching()
    whole = gradients_of_a_step(model, wrapper, batch())
    for half, full in zip(halves, whole):
        torch.testing.assert_close(2 * half, full)


def test_features_come_nearer_and_without_it_they_leave():
    ends = {}
    for weight, steps in ((30.0, 0), (None, 20), (30.0, 20)):
        model, wrapper, dense = searching(weight)
        for seed in range(steps):
            model.train_step(batch(seed), wrapper)
        with torch.no_grad():
            images = batch(99)['inputs']
            ends[weight, steps] = float(distance_by_hand(model.train(), dense, images))
    assert ends[30.0, 20] < ends[30.0, 0] < ends[None, 20]


def test_outputs_come_nearer_and_without_it_they_leave():
    ends = {}
    for weight, steps in ((300.0, 0), (None, 60), (300.0, 60)):  # the loss wants scores of zero
        model, wrapper, dense = searching(weight, lr=0.01, of='outputs')
        for _ in range(steps):
            model.train_step(batch(), wrapper)
        with torch.no_grad():
            images = batch()['inputs']
            ends[weight, steps] = float(distance_by_hand(model.train(), dense, images, 'outputs'))
    assert ends[300.0, 60] < ends[300.0, 0] < ends[None, 60]


@pytest.mark.parametrize('of', TEACHERS)
def test_dense_network_is_neither_trained_nor_random(of):
    model, wrapper, _ = searching(model=network(dropout=0.5), of=of)
    before = copy.deepcopy(wrapper.distillation.state_dict())
    torch.manual_seed(7)
    for seed in range(3):
        model.train_step(batch(seed), wrapper)
    drawn = torch.rand(1)
    after = wrapper.distillation.state_dict()
    taught = model if of == 'outputs' else model.backbone
    assert before.keys() == {key for key in taught.state_dict()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    model, wrapper, _ = searching(weight=None, model=network(dropout=0.5))
    torch.manual_seed(7)
    for seed in range(3):
        model.train_step(batch(seed), wrapper)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize('of', TEACHERS)
def test_model_stays_the_stock_model(of):
    model, wrapper, dense = searching(of=of)
    model.train_step(batch(), wrapper)
    model.head.forward = None  # a forward pass that fails on the way
    with pytest.raises(TypeError, match='NoneType'), wrapper.optim_context(model):
        model(**batch())
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())
    assert len(list(model.modules())) == len(list(dense.modules()))


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
@pytest.mark.parametrize('of', TEACHERS)
def test_half_precision_is_compared_in_full(of):
    model = network().float()
    model, wrapper, dense = searching(
        model=model, wrapper_type=SmartAmpOptimWrapper, dtype='bfloat16', of=of
    )
    with wrapper.optim_context(model):
        model(inputs=batch()['inputs'].float())
    given = wrapper.distillation.distance()
    assert given.dtype == torch.float32
    wanted = distance_by_hand(model, dense, batch()['inputs'].float(), of)
    assert given.item() == pytest.approx(wanted.item(), rel=0.05)


def test_feature_maps_that_are_missing_on_one_side_are_left_out():
    one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert feature_distance((one, [one], None), (two, [None], one)) == 1
    assert feature_distance((one, two), (two, two)) == 0.5
    with pytest.raises(ValueError, match=r'smart\.distillation: .* no feature map'):
        feature_distance([one], [one[0]])


def test_scale_of_the_features_does_not_matter():
    one, two = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(feature_distance(one, two), feature_distance(100 * one, 100 * two))


def test_dead_features_have_a_finite_distance():
    assert feature_distance(torch.zeros(3), torch.zeros(3)) == 0
    assert bool(feature_distance(torch.ones(3), torch.zeros(3)).isfinite())


def test_model_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match=r'smart\.distillation: Linear has no `backbone`'):
        DenseFeatures(nn.Linear(2, 2), WEIGHT)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # mmdet's own
def test_teacher_knows_what_of_an_image_was_padded():
    pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    from mmdet.structures import DetDataSample

    config = Config.fromfile(upstream_config('mmdet', DETR))
    one = dict(num_layers=1)
    changes = dict(
        backbone=dict(depth=18, init_cfg=None),
        neck=dict(in_channels=[512]),
        encoder=one,
        decoder=one,
    )
    config.merge_from_dict(dict(model=changes))
    model = load_model(config)  # which is in evaluation mode, so without dropout
    teacher = DenseOutputs(model, WEIGHT)
    teacher.begin()
    sizes = dict(batch_input_shape=(128, 128), pad_shape=(128, 128))
    samples = [
        DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, **sizes))
        for shape in ((128, 128), (64, 96))
    ]
    images = torch.randn(2, 3, 128, 128)
    with teacher.compared():
        model(images, samples, mode='tensor')
    assert teacher.distance() < 1e-9


def test_outputs_that_no_layer_gives_are_refused():
    model, wrapper, _ = searching(of='outputs')
    wrapper.distillation._dense.forward = lambda inputs, mode: 2 * inputs
    with pytest.raises(ValueError, match=r"smart\.distillation\.of: 'outputs' of Network can't be"):
        model.train_step(batch(), wrapper)


def test_outputs_that_can_not_be_compared_are_refused_before_the_search():
    model, wrapper, _ = searching(of='outputs')
    wrapper.distillation.begun = False
    wrapper.distillation._dense.forward = lambda inputs, mode: inputs.missing
    with pytest.raises(ValueError, match=r"AttributeError: .* smart\.distillation\.of='features'"):
        model.train_step(batch(), wrapper)


def test_model_whose_images_have_another_name_is_refused():
    model, wrapper, _ = searching(of='outputs')
    with (
        pytest.raises(ValueError, match=r"'outputs' of Network can't be .* tensor of `inputs`"),
        wrapper.optim_context(model),
    ):
        model(images=batch()['inputs'])


@pytest.mark.parametrize(('of', 'called'), [('features', 'backbone'), ('outputs', 'model')])
def test_step_that_calls_nothing_is_refused(of, called):
    model, wrapper, _ = searching(of=of)
    with pytest.raises(RuntimeError, match=rf'smart\.distillation: .* never called the {called}'):
        wrapper.update_params(model.head.weight.sum())


def test_number_is_the_weight():
    assert read_distillation(2) == read_distillation(dict(weight=2))
    assert (read_distillation(dict()).weight, read_distillation(2).of) == (5.0, 'outputs')
    assert read_distillation(None) is None


@pytest.mark.parametrize(
    ('saved', 'now'),
    [(None, DenseFeatures), ('features', None), ('features', DenseOutputs),
     ('outputs', DenseFeatures)],
)  # fmt: skip
def test_resume_with_another_distillation_is_refused(saved, now):
    _, wrapper, _ = searching(saved and WEIGHT, of=saved)
    state = wrapper.state_dict()
    model = network()
    masks = install_masks(model, sparsity=0.5, block=(2, 2, 1, 1))
    other = SmartOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    other.attach(masks, now and now(model, WEIGHT))
    with pytest.raises(ValueError, match=r'resume: .* smart\.distillation'):
        other.load_state_dict(state)


# Runs of 24 iterations, the search from 6 to 18, kept apart from one another by MMEngine.


@pytest.fixture(scope='module')
def distilled(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('distilled')
    outcome = train(smart_config(work_dir, DISTILLED, **DROPOUT))
    assert outcome.error is None, outcome.log
    return work_dir, outcome.value


def test_distance_is_logged_from_the_search_on(distilled):
    work_dir, _ = distilled
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    logged = [line.get('distillation') for line in lines if 'loss' in line]
    assert logged[:6] == [None] * 6
    assert all(distance > 0 for distance in logged[6:]) and len(logged) == 24


def test_checkpoints_keep_the_dense_network_beside_the_masks_alone(distilled):
    work_dir, _ = distilled
    dense, soft, hard = (
        torch.load(work_dir / f'epoch_{epoch}.pth', weights_only=False) for epoch in (1, 2, 4)
    )
    assert dense['optimizer']['smart']['distillation'] == {}
    kept = soft['optimizer']['smart']['distillation']
    assert all(torch.equal(kept[key], dense['state_dict'][f'backbone.{key}']) for key in kept)
    assert kept.keys() == hard['optimizer']['smart']['distillation'].keys()
    assert all(
        torch.equal(kept[k], x) for k, x in hard['optimizer']['smart']['distillation'].items()
    )
    for state in (soft['state_dict'], hard['state_dict'], pruned_weights(work_dir)):
        assert state.keys() == dense['state_dict'].keys()


def test_data_and_dropout_are_those_of_a_run_without_it(distilled, tmp_path):
    _, notes = distilled
    plain = train(smart_config(tmp_path, **DROPOUT)).value
    assert [note['data'] for note in plain] == [note['data'] for note in notes]
    # The loss that is logged is the task's, and differs after the first step of the search.
    assert [note['loss'] for note in plain[:7]] == [note['loss'] for note in notes[:7]]
    assert plain[7]['loss'] != notes[7]['loss']


@pytest.mark.parametrize('settings', [OUTPUTS, DISTILLED], ids=TEACHERS)
def test_run_with_distillation_resumes(tmp_path, settings):
    config = merged(run_of(tmp_path, DROPOUT, ACCUMULATION, EMA), dict(smart=settings))
    assert_resumes(tmp_path, config, 9, 15, 21)


@pytest.mark.parametrize('settings', [OUTPUTS, DISTILLED], ids=TEACHERS)
def test_two_processes_distil_the_same_network(tmp_path, settings):
    one, two = train_on(2, smart_config(tmp_path, settings))
    # 12 iterations, the search from the 4th on; by then their statistics of BatchNorm differ.
    dense = [note['dense'] for note in one]
    assert dense == [note['dense'] for note in two]
    assert len(set(dense)) == 2 and dense[2] != dense[3] == dense[11]
    assert [note['mask'] for note in one] == [note['mask'] for note in two]
    assert one[5]['loss'] != two[5]['loss']
