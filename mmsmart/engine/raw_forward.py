"""Backbone, neck and head of an OpenMMLab model as one function from images to tensors."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

# Edge lengths, in pixels, of boxes that a feature pyramid of four levels spreads over all of them.
_BOX_EDGES = (56.0, 168.0, 336.0, 672.0)


class RawForward(nn.Module):
    """Images in, the network's own tensors out: no data samples, no post-processing.

    Holds the model as `model` and changes nothing in it, neither its mode nor its gradients.

    ============================  =================================================================
    model                         outputs
    ============================  =================================================================
    mmpretrain classifier         `scores` `(N, classes)`, before the softmax
    mmdet single-stage detector   what its head's losses take, by level: `cls_scores_0`,
                                  `bbox_preds_0`, ... `(N, channels, h, w)`
    mmdet two-stage detector      `rpn_cls_scores_0`, `rpn_bbox_preds_0`, ..., then the
                                  `features_0`, ... that the RoI head pools from
    mmseg segmentor               `seg_logits` `(N, classes, h, w)`, not resized
    ============================  =================================================================

    Args:
        model: A model built by MMEngine's `MODELS`.
        auxiliary: Run also what only training uses (auxiliary heads), and the RoI head of a
            two-stage detector on four fixed boxes of the first image, cut off from what is before
            it. Its `roi_cls_score`, `roi_bbox_pred` and `roi_mask_preds` follow the features.
    """

    def __init__(self, model: nn.Module, auxiliary: bool = False) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = auxiliary

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """All outputs in a fixed order, for preprocessed images `(N, C, H, W)`."""
        return tuple(self.named_outputs(inputs).values())

    def output_names(self, inputs: Tensor) -> list[str]:
        """Names of the tensors that :meth:`forward` gives for such images, in its order."""
        with torch.no_grad():
            return list(self.named_outputs(inputs))

    def named_outputs(self, inputs: Tensor, samples: Any = None) -> dict[str, Tensor]:
        """The outputs of :meth:`forward` by name.

        Args:
            inputs: Preprocessed images `(N, C, H, W)`.
            samples: Their data samples, which tell transformers what of an image was padded;
                without them, nothing was.
        """
        model = self.model
        if _is_a(model, 'mmdet.models.detectors', 'TwoStageDetector'):
            outputs = self._two_stage(inputs)
        elif _is_a(model, 'mmdet.models.detectors', 'BaseDetector'):
            outputs = self._detector(inputs, samples)
        elif _is_a(model, 'mmseg.models.segmentors', 'BaseSegmentor'):
            outputs = self._segmentor(inputs)
        else:
            outputs = model(inputs, mode='tensor')
            head = getattr(model, 'head', None)
            outputs = {'scores' if head is not None else 'features': outputs}
        return dict(_flat(outputs))

    def _detector(self, inputs: Tensor, samples: Any) -> dict[str, Any]:
        head = getattr(self.model, 'bbox_head', None)
        # Transformers ask each image for its size, to mask what was padded. Nobody else does, and a
        # list as long as the batch would fix its size in a traced graph.
        dense = _is_a(head, 'mmdet.models.dense_heads.base_dense_head', 'BaseDenseHead')
        if dense:
            samples = None
        elif samples is None:
            samples = _unpadded(inputs)
        return _named_by_losses(head, self.model(inputs, samples, mode='tensor'))

    def _two_stage(self, inputs: Tensor) -> dict[str, Any]:
        model = self.model
        features = model.extract_feat(inputs)
        outputs = {}
        if model.with_rpn:
            named = _named_by_losses(model.rpn_head, model.rpn_head(features))
            outputs.update({f'rpn_{name}': value for name, value in named.items()})
        outputs['features'] = features
        if not self.auxiliary:
            return outputs
        # A graph of its own: what the RoI head pools is an output of the network before it.
        features = [level.detach().requires_grad_() for level in features]
        rois = inputs.new_tensor([(0, 0, 0, edge, edge) for edge in _BOX_EDGES])
        head = model.roi_head
        stages = getattr(head, 'num_stages', None)
        for stage in [()] if stages is None else [(i,) for i in range(stages)]:
            suffix = ''.join(f'_{i}' for i in stage)
            if head.with_bbox:
                made = head._bbox_forward(*stage, features, rois)
                for name in ('cls_score', 'bbox_pred'):
                    outputs[f'roi_{name}{suffix}'] = made[name]
            if head.with_mask:
                made = head._mask_forward(*stage, features, rois)
                outputs[f'roi_mask_preds{suffix}'] = made['mask_preds']
        return outputs

    def _segmentor(self, inputs: Tensor) -> dict[str, Any]:
        model = self.model
        features = model.extract_feat(inputs)
        heads = model.decode_head
        if not isinstance(heads, nn.ModuleList):
            outputs = {'seg_logits': heads(features)}
        else:
            logits = heads[0](features)
            for head in heads[1:]:
                logits = head(features, logits)
            outputs = {'seg_logits': logits}
        if self.auxiliary and model.with_auxiliary_head:
            heads = model.auxiliary_head
            for i, head in enumerate(heads if isinstance(heads, nn.ModuleList) else [heads]):
                outputs[f'auxiliary_{i}'] = head(features)
        return outputs


@torch.no_grad()
def last_layers(forward: RawForward, inputs: Tensor, samples: Any = None) -> list[str]:
    """Names of the model's layers whose results are its outputs, as they are or in another shape.

    Args:
        forward: The model.
        inputs: Preprocessed images `(N, C, H, W)`, one is enough.
        samples: Their data samples, as :meth:`RawForward.named_outputs` takes them.

    Raises:
        ValueError: If every output is computed out of what layers give, as by an exponential.

    Example:
        >>> class Classifier(nn.Sequential):
        ...     def forward(self, inputs, mode):
        ...         return super().forward(inputs)
        >>> model = Classifier(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> last_layers(RawForward(model), torch.ones(1, 2))
        ['2']
    """
    made_by: dict[int, str] = {}
    held = []  # all results at once, so that no two of them take the same memory by turns
    handles = []
    for name, module in forward.model.named_modules():
        if next(module.children(), None) is None:

            def note(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
                if isinstance(result, Tensor):
                    held.append(result)
                    made_by[_memory(result)] = name

            handles.append(module.register_forward_hook(note))
    try:
        # Mixed precision may end in a cast, whose result is another tensor.
        with torch.autocast(inputs.device.type, enabled=False):
            outputs = forward.named_outputs(inputs, samples).values()
    finally:
        for handle in handles:
            handle.remove()
    places = [_memory(output) for output in outputs]
    found = list(dict.fromkeys(made_by[place] for place in places if place in made_by))
    if not found:
        raise ValueError(
            f'{type(forward.model).__name__}: none of its outputs is what a layer gives; all are '
            'computed out of that.'
        )
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def example_input(config: Config, shape: Sequence[int] | None = None) -> Tensor:
    """One image of noise, of the size at which the config tests its model: `(1, C, H, W)`.

    The size is that of the last resize, crop or padding of the test pipeline, rounded up to what
    the data preprocessor pads to. A resize that keeps an image's aspect ratio counts as the largest
    image that it can make.

    Args:
        config: The config; of its model are taken the channels of an image.
        shape: `(H, W)`, or one number for a square, instead of the pipeline's.

    Raises:
        ValueError: If the shape is not one or two integers above 0, or the pipeline has no size.
    """
    if shape is None:
        height, width = _test_size(config)
    else:
        height, width = shape * 2 if len(shape) == 1 else shape if len(shape) == 2 else (0, 0)
        if min(height, width) < 1:
            raise ValueError(
                f'shape: expected height and width above 0, or one number for both, got {shape}.'
            )
    channels = upstream_settings(config).get('backbone', {}).get('in_channels', 3)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, height, width, generator=generator)


def upstream_settings(config: Config) -> dict[str, Any]:
    """A copy of the config's `model`, or of the one that an mmsmart builder is wrapped around.

    As MMEngine's tools do, it takes over a `data_preprocessor` that stands beside the model.
    """
    model = copy.deepcopy(config.model)
    if str(model.type).startswith('mmsmart.'):
        model = model.model
    if config.get('data_preprocessor'):
        model.setdefault('data_preprocessor', copy.deepcopy(config.data_preprocessor))
    return model


def _test_size(config: Config) -> tuple[int, int]:
    height = width = None
    divisor = 1
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    for step in dataset.get('pipeline', []):
        kind = str(step['type']).rpartition('.')[2]
        if kind == 'ResizeEdge':
            height = width = step['scale']
        elif 'Resize' in kind and step.get('scale') is not None:
            height, width = _height_and_width(step['scale'], step.get('keep_ratio', False))
        elif kind == 'CenterCrop':
            height, width = _height_and_width(step['crop_size'])
        elif kind == 'Pad' and step.get('size') is not None:
            height, width = _height_and_width(step['size'])
        elif kind == 'Pad' and step.get('size_divisor'):
            divisor = math.lcm(divisor, step['size_divisor'])
    if height is None:
        raise ValueError(
            f'{config.filename or "config"}: its test pipeline does not say how large an image '
            'is. Give the size: --shape HEIGHT WIDTH.'
        )
    preprocessor = upstream_settings(config).get('data_preprocessor') or {}
    padding = {**preprocessor, **(preprocessor.get('test_cfg') or {})}
    for key in ('pad_size_divisor', 'size_divisor'):
        divisor = math.lcm(divisor, padding.get(key) or 1)
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def _height_and_width(size: int | Sequence[int], either_way: bool = False) -> tuple[int, int]:
    """OpenMMLab writes sizes as (width, height); with `either_way` an image may lie or stand."""
    width, height = (size, size) if isinstance(size, int) else size
    return (min(size), max(size)) if either_way and not isinstance(size, int) else (height, width)


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether it is of this class; where the class's module was never imported, it is not."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _unpadded(inputs: Tensor) -> list[Any]:
    from mmdet.structures import DetDataSample

    size = tuple(inputs.shape[-2:])
    known = {
        'ori_shape': size, 'img_shape': size, 'pad_shape': size, 'batch_input_shape': size,
        'scale_factor': (1.0, 1.0),
    }  # fmt: skip
    return [DetDataSample(metainfo=known) for _ in range(inputs.shape[0])]


def _named_by_losses(head: nn.Module | None, outputs: Any) -> dict[str, Any]:
    """Name a head's outputs as the arguments under which its losses take them."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    by_feat = getattr(head, 'loss_by_feat', None)
    names = list(inspect.signature(by_feat).parameters) if by_feat else []
    names = [name for name in names if not name.startswith('batch_')]
    if len(names) < len(outputs):
        names = [f'output_{i}' for i in range(len(outputs))]
    return dict(zip(names, outputs))


def _flat(value: Any, name: str = '') -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f'{name}_{key}'.lstrip('_'))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _flat(item, name if len(value) == 1 else f'{name}_{i}')
