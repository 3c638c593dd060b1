"""Tests of mmsmart.engine.raw_forward: whole networks without samples and post-processing."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmsmart.cost import count_positions
from mmsmart.engine.export import load_model, read_config
from mmsmart.engine.raw_forward import RawForward, example_input, last_layers

CONFIGS = Path(__file__).parents[2] / 'configs'

# Config, edge length, first output, number of outputs, and with auxiliary parts.
EVERY_DAY = [
    ('mmpretrain/resnet18_digits', 32, 'scores', 1, 1),
    ('mmpretrain/deit-small_4xb256_in1k_smart', 64, 'scores', 1, 1),
    ('mmdet/yolox_tiny_8xb8-300e_coco_smart', 64, 'cls_scores_0', 9, 9),
    ('mmdet/retinanet_r18_fpn_1x_coco_smart', 64, 'cls_scores_0', 10, 10),
    ('mmdet/mask-rcnn_r18_fpn_scenes', 64, 'rpn_cls_scores_0', 15, 18),
    ('mmseg/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024_smart', 64, 'seg_logits', 1, 2),
    ('mmseg/segformer_mit-b0_8xb2-160k_ade20k-512x512_smart', 64, 'seg_logits', 1, 1),
]
SLOW = [
    ('mmpretrain/resnet50_8xb32_in1k_smart', 64, 'scores', 1, 1),
    ('mmpretrain/mobilenet-v2_8xb32_in1k_smart', 64, 'scores', 1, 1),
    ('mmpretrain/regnetx-400mf_8xb128_in1k_smart', 64, 'scores', 1, 1),
    ('mmpretrain/swin-tiny_16xb64_in1k_smart', 224, 'scores', 1, 1),
    ('mmdet/fcos_r50-caffe_fpn_gn-head_1x_coco_smart', 64, 'cls_scores_0', 15, 15),
    ('mmdet/rtmdet_s_8xb32-300e_coco_smart', 64, 'cls_scores_0', 6, 6),
    ('mmdet/yolov3_d53_8xb8-ms-608-273e_coco_smart', 64, 'pred_maps_0', 3, 3),
    ('mmdet/faster-rcnn_r50_fpn_1x_coco_smart', 64, 'rpn_cls_scores_0', 15, 17),
    ('mmdet/mask-rcnn_r50_fpn_1x_coco_smart', 64, 'rpn_cls_scores_0', 15, 18),
    ('mmseg/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024_smart', 64, 'seg_logits', 1, 5),
    ('mmseg/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024_smart', 64, 'seg_logits', 1, 2),
    ('mmseg/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024_smart', 64, 'seg_logits', 1, 2),
    ('mmseg/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024_smart', 64, 'seg_logits', 1, 2),
]
MODELS = [*EVERY_DAY, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]


def read(name):
    if name.startswith('mmdet'):
        pytest.importorskip('mmcv._ext', reason="detectors need mmcv's ops")
    return read_config(CONFIGS / f'{name}.py')


def built(name, edge):
    config = read(name)
    torch.manual_seed(0)
    return load_model(config), example_input(config, (edge, edge))


@pytest.mark.parametrize(('name', 'edge', 'first', 'raw', 'auxiliary'), MODELS)
def test_every_trained_weight_of_the_model_gets_a_gradient(name, edge, first, raw, auxiliary):
    model, images = built(name, edge)
    forward = RawForward(model, auxiliary=True)
    names = forward.output_names(images)
    # Layers run where a hook can see them; attention uses its projection's weight by itself.
    positions = count_positions(model, lambda: forward(images))
    assert [key for key, n in positions.items() if not n and 'attn.out_proj' not in key] == []
    outputs = forward.train()(torch.cat([images, images]))
    assert names[0] == first and len(names) == len(set(names)) == len(outputs) == auxiliary
    assert len(RawForward(model.eval()).output_names(images)) == raw
    sum(output.square().sum() for output in outputs).backward()
    dead = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert dead == []


LAST = {
    'mmpretrain/resnet18_digits': ['head.fc'],
    'mmpretrain/deit-small_4xb256_in1k_smart': ['head.layers.head'],
    'mmdet/yolox_tiny_8xb8-300e_coco_smart': [
        f'bbox_head.multi_level_conv_{kind}.{i}' for kind in ('cls', 'reg', 'obj') for i in range(3)
    ],
    'mmdet/retinanet_r18_fpn_1x_coco_smart': ['bbox_head.retina_cls', 'bbox_head.retina_reg'],
    'mmdet/mask-rcnn_r18_fpn_scenes': [
        'rpn_head.rpn_cls', 'rpn_head.rpn_reg', *(f'neck.fpn_convs.{i}.conv' for i in range(4))
    ],
    'mmdet/rtmdet_s_8xb32-300e_coco_smart': [f'bbox_head.rtm_cls.{i}' for i in range(3)],
    'mmseg/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024_smart': ['decode_head.conv_seg'],
}  # fmt: skip


@pytest.mark.parametrize('name', LAST)
def test_last_layers_are_those_whose_results_are_outputs(name):
    model, images = built(name, 64)
    assert last_layers(RawForward(model.eval()), images) == LAST[name]
    assert not any(module._forward_hooks for module in model.modules())


class Exponential(nn.Sequential):
    def forward(self, inputs, mode):
        return super().forward(inputs).exp()


def test_model_whose_outputs_are_computed_has_no_last_layers():
    with pytest.raises(ValueError, match='Exponential: none of its outputs is what a layer gives'):
        last_layers(RawForward(Exponential(nn.Linear(2, 2))), torch.ones(1, 2))


def test_a_classifier_gives_the_scores_of_its_head():
    model, images = built('mmpretrain/resnet18_digits', 32)
    (scores,) = RawForward(model)(images)
    (sample,) = model.predict(images)
    torch.testing.assert_close(scores.softmax(1)[0], sample.pred_score)


def test_a_segmentor_gives_the_logits_that_its_prediction_resizes():
    name = 'mmseg/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024_smart'
    model, images = built(name, 64)
    with torch.no_grad():
        (logits,) = RawForward(model)(images)
        (sample,) = model.predict(images)
    resized = nn.functional.interpolate(logits, (64, 64), mode='bilinear')
    torch.testing.assert_close(resized[0], sample.seg_logits.data)


@pytest.mark.filterwarnings('ignore:torch.meshgrid:UserWarning')  # mmdet's own
def test_maps_of_a_detector_have_the_names_under_which_its_head_takes_them():
    model, images = built('mmdet/yolox_tiny_8xb8-300e_coco_smart', 64)
    from mmdet.structures import DetDataSample

    model.bbox_head.test_cfg.score_thr = 0.0
    metainfo = {'img_shape': (64, 64), 'ori_shape': (64, 64), 'scale_factor': (1.0, 1.0)}
    with torch.no_grad():
        maps = {}
        for key, value in RawForward(model).named_outputs(images).items():
            maps.setdefault(key.rpartition('_')[0], []).append(value)
        made = model.bbox_head.predict_by_feat(**maps, batch_img_metas=[metainfo], rescale=True)
        (sample,) = model.predict(images, [DetDataSample(metainfo=metainfo)])
    assert len(made[0]) == len(sample.pred_instances) > 0
    assert torch.equal(made[0].bboxes, sample.pred_instances.bboxes)


def test_a_two_stage_detector_gives_the_features_that_its_roi_head_pools_from():
    model, images = built('mmdet/mask-rcnn_r18_fpn_scenes', 64)
    with torch.no_grad():
        outputs = RawForward(model).named_outputs(images)
        features = model.extract_feat(images)
    assert all(torch.equal(outputs[f'features_{i}'], level) for i, level in enumerate(features))


def test_the_roi_head_runs_in_a_graph_of_its_own():
    model, images = built('mmdet/mask-rcnn_r18_fpn_scenes', 64)
    outputs = RawForward(model, auxiliary=True).named_outputs(images)
    boxes = {key: value for key, value in outputs.items() if key.startswith('roi_')}
    assert {key: len(value) for key, value in boxes.items()} == {
        'roi_cls_score': 4, 'roi_bbox_pred': 4, 'roi_mask_preds': 4,
    }  # fmt: skip
    sum(value.sum() for value in boxes.values()).backward()
    reached = {key.split('.')[0] for key, p in model.named_parameters() if p.grad is not None}
    assert reached == {'roi_head'}


def test_mode_weights_and_gradients_of_the_model_stay_as_they_were():
    model, images = built('mmpretrain/resnet18_digits', 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = RawForward(model).output_names(images)
    assert names == ['scores'] and not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# The size of an image


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('mmpretrain/resnet50_8xb32_in1k_smart', (224, 224)),  # resized to 256, cropped
        ('mmpretrain/resnet18_digits', (32, 32)),
        ('mmdet/yolox_tiny_8xb8-300e_coco_smart', (416, 416)),
        ('mmdet/retinanet_r18_fpn_1x_coco_smart', (800, 1344)),  # 1333 wide, padded to 32
        ('mmseg/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024_smart', (1024, 2048)),
    ],
)
def test_the_size_is_that_of_the_test_pipeline(name, size):
    assert example_input(read(name)).shape == (1, 3, *size)


@pytest.mark.parametrize(('shape', 'size'), [([48], (48, 48)), ((40, 56), (40, 56))])
def test_a_size_that_is_given_is_taken_as_it_is(shape, size):
    assert example_input(read('mmpretrain/resnet18_digits'), shape).shape == (1, 3, *size)


def test_the_image_has_the_channels_of_the_backbone():
    config = Config({'model': {'type': 'A', 'backbone': {'type': 'B', 'in_channels': 1}}})
    assert example_input(config, [8]).shape == (1, 1, 8, 8)


def test_an_image_is_the_same_every_time():
    config = read('mmpretrain/resnet18_digits')
    assert torch.equal(example_input(config), example_input(config))


@pytest.mark.parametrize('shape', [[], [0], [8, -8], [8, 8, 8]])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match='shape: expected height and width above 0'):
        example_input(read('mmpretrain/resnet18_digits'), shape)


def test_a_pipeline_without_a_size_asks_for_one():
    with pytest.raises(ValueError, match='--shape HEIGHT WIDTH'):
        example_input(read('mmpretrain/resnet18_8xb16_cifar10'))
