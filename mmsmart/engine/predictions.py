"""What a model sees before and after pruning, beside the truth, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import CheckpointLoader

from mmsmart.export import complete_or_absent

_LEAST_SCORE = 0.3
_OPACITY = 0.65
_INCHES = 1.7  # of one scene in the picture


def draw_predictions(
    config: Config, checkpoints: Mapping[str, str | Path], path: str | Path, scenes: int = 6
) -> None:
    """Draw the first scenes of the test data, one row for the truth and one for each checkpoint.

    For detectors and segmentors of mmdet and mmseg, and data sets that keep `img` (BGR) in memory.
    Detections with a score below 0.3 are left out.

    Args:
        config: Holds `default_scope`, `model` and `test_dataloader`.
        checkpoints: Title of the row and file, from a trusted source. The stock model loads its
            weights; entries of the file that it lacks are ignored.
        path: The picture to write.
        scenes: How many, one a column.

    Raises:
        KeyError: If a checkpoint lacks a weight of the model.
    """
    init_default_scope(config.default_scope)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    images = [dataset.get_data_info(index)['img'][..., ::-1] for index in range(scenes)]
    rows, samples = {}, []
    for title, file in checkpoints.items():
        samples = _predicted(config, file, dataset, scenes)
        rows[title] = [_prediction(sample) for sample in samples]
    rows = {'truth': [_truth(sample) for sample in samples], **rows}
    _draw(images, rows, dataset.metainfo, path)


def _predicted(config: Config, file: str | Path, dataset: BaseDataset, scenes: int) -> list[Any]:
    model = MODELS.build(config.model).eval()
    # MMEngine's own checkpoints hold objects that `weights_only=True` refuses, so it loads them.
    saved = CheckpointLoader.load_checkpoint(str(file), 'cpu', logger='silent')['state_dict']
    model.load_state_dict({key: saved[key] for key in model.state_dict()})
    with torch.no_grad():
        return model.test_step(pseudo_collate([dataset[index] for index in range(scenes)]))


# What is drawn on a scene: the class of each pixel, -1 for none, and boxes with their class.
_Drawing = tuple[np.ndarray, list[tuple[Sequence[float], int]]]


def _prediction(sample: Any) -> _Drawing:
    if 'pred_sem_seg' in sample:
        return _painted(sample.pred_sem_seg.data[0].numpy()), []
    found = sample.pred_instances[sample.pred_instances.scores >= _LEAST_SCORE].numpy()
    masks = found.masks if 'masks' in found else []
    boxes = list(zip(found.bboxes.tolist(), found.labels.tolist()))
    return _stacked(sample.ori_shape, masks, found.labels), boxes


def _truth(sample: Any) -> _Drawing:
    if 'gt_sem_seg' in sample:
        return _painted(sample.gt_sem_seg.data[0].numpy()), []
    labels = [instance['bbox_label'] for instance in sample.instances]
    masks = []
    if 'masks' in sample.pred_instances:
        masks = [_decoded(**instance['mask']) for instance in sample.instances]
    boxes = [(instance['bbox'], instance['bbox_label']) for instance in sample.instances]
    return _stacked(sample.ori_shape, masks, labels), boxes


def _painted(labels: np.ndarray) -> np.ndarray:
    """Classes of a label map whose class 0 is the background, which stays bare."""
    return np.where(labels == 0, -1, labels.astype(np.int64))


def _stacked(
    shape: Sequence[int], masks: Sequence[np.ndarray], labels: Sequence[int]
) -> np.ndarray:
    classes = np.full(shape, -1)
    for mask, label in zip(masks, labels):
        classes[mask.astype(bool)] = label
    return classes


def _decoded(size: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The mask of COCO's uncompressed RLE."""
    return np.repeat(np.arange(len(counts)) % 2, counts).reshape(size, order='F')


def _draw(
    images: list[np.ndarray],
    rows: dict[str, list[_Drawing]],
    metainfo: dict[str, Any],
    path: str | Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    palette = np.array(metainfo['palette'])
    figure = Figure(figsize=(_INCHES * len(images), _INCHES * len(rows)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (title, drawings) in zip(grid, rows.items()):
        line[0].set_ylabel(title)
        for axes, image, (classes, boxes) in zip(line, images, drawings):
            colours = palette[np.maximum(classes, 0)]
            mixed = _OPACITY * colours + (1 - _OPACITY) * image
            shown = np.where((classes >= 0)[..., None], mixed, image)
            axes.imshow(shown.astype(np.uint8), interpolation='nearest')
            axes.set(xticks=[], yticks=[])
            for (x1, y1, x2, y2), label in boxes:
                colour = tuple(palette[label] / 255)
                place = (x1 - 0.5, y1 - 0.5)  # a pixel's centre is at whole numbers
                frame = dict(fill=False, edgecolor=colour, linewidth=1.2)
                axes.add_patch(Rectangle(place, x2 - x1, y2 - y1, **frame))
                axes.text(
                    *place, metainfo['classes'][label], color='white', fontsize=6.5,
                    va='bottom' if y1 > image.shape[0] / 12 else 'top',  # or it would be cut off
                    bbox=dict(facecolor=colour, edgecolor='none', pad=0.8),
                )  # fmt: skip
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=85)
