"""What a trial of one model finds out."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmsmart.blocks import find_layers
from mmsmart.engine.sweep.stock_models import StockModel
from mmsmart.engine.sweep.trial import kept_weights, reason_of, try_model


def test_a_config_that_cannot_be_read_is_a_row_and_not_the_end():
    row = try_model(StockModel('mmdet', 'nowhere.py'))
    assert row['outcome'] == 'stock fails'
    assert 'nowhere.py' in row['reason']
    json.dumps(row)


def test_reasons_are_one_short_line_without_paths_of_this_machine():
    text = reason_of(OSError('/home/me/a.py failed\n  at https://openmmlab.com/x ' + 'y' * 300))
    assert text.startswith('OSError: a.py failed at https://openmmlab.com/x yyy')
    assert len(text) == 200


@pytest.mark.parametrize(
    'layer', [nn.Linear(10, 6), nn.Conv2d(12, 8, 3, groups=2), nn.ConvTranspose2d(5, 7, 2)]
)
def test_kept_weights_are_counted_in_the_state_dict_alone(layer):
    """By definition: visit every block, one at a time."""
    layers, _ = find_layers(nn.Sequential(layer), block=(4, 3))
    [found] = layers
    view = found.weight.data.fill_(1).view(found.view_shape)
    expected_kept, pruned = 0, []
    corners = torch.cartesian_prod(
        *(torch.arange(0, size, step) for size, step in zip(found.view_shape, found.block))
    )
    for i, corner in enumerate(corners.tolist()):
        block = view[tuple(slice(c, c + step) for c, step in zip(corner, found.block))]
        if i % 3:
            pruned.append(block.numel())
            block.zero_()
        else:
            expected_kept += block.numel()
    assert kept_weights(layers, {'0.weight': layer.weight}) == (expected_kept, min(pruned))
