"""One trial of a stock model: can it be pruned?

A trial runs a model on synthetic data, first as it is, then with block masks: a step, hardening,
export and loading into a stock model that was built anew. It needs no network and no data set.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn import functional as F

from mmsmart.blocks import BlockLayer
from mmsmart.engine.sweep.stock_models import StockModel, shallower, stock_model_config
from mmsmart.engine.sweep.synthetic import edge_length, input_sizes, synthetic_batch
from mmsmart.export import save_plain_checkpoint
from mmsmart.importance import magnitude
from mmsmart.install import install_masks
from mmsmart.masking import BlockMasks

_LARGE = 60_000_000  # parameters above which a model is tried with fewer layers


def try_model(
    model: StockModel, enter: Callable[[str], None] = lambda part: None
) -> dict[str, Any]:
    """One row of the table: does this model run one step, and can it be pruned?

    Args:
        model: The model.
        enter: Is told when a part, 'stock' or 'SMART', begins.
    """
    row = blank_row(model)
    part = 'stock'
    started = time.monotonic()
    try:
        enter(part)
        config = model.load()
        # mmpretrain ships configs of detectors and segmentors too, to compare backbones by.
        scope = config.get('default_scope') or model.package
        with DefaultScope.overwrite_default_scope(scope):
            build, data = _try_stock(scope, config, row)
            part = 'SMART'
            enter(part)
            _try_pruned(build, data, row)
    except Exception as error:
        row.update(outcome=f'{part} fails', reason=reason_of(error))
    row['seconds'] = round(time.monotonic() - started, 2)
    return row


def blank_row(model: StockModel) -> dict[str, Any]:
    """The row of a model of which nothing is known yet."""
    return {
        'package': model.package, 'config': model.config, 'configs': model.configs,
        'model': '', 'input': None, 'reduced': '', 'layers': 0, 'blocks': 0, 'dense': {},
        'outcome': 'ok', 'reason': '', 'seconds': 0.0,
    }  # fmt: skip


def reason_of(error: BaseException) -> str:
    """An error in one line, without paths of this machine.

    Example:
        >>> reason_of(ValueError('no such file: /home/me/model.pth, sorry'))
        'ValueError: no such file: model.pth, sorry'
    """
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    text = re.sub(r'(?<![\w:/])/(?:[^\s/\'",:]+/)+', '', text)
    return text if len(text) <= 200 else f'{text[:197]}...'


def _try_stock(
    scope: str, config: Config, row: dict[str, Any]
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    wanted = stock_model_config(config)
    row['model'] = _describe(wanted)
    if sum(parameter.numel() for parameter in _built(wanted).parameters()) > _LARGE:
        smaller = copy.deepcopy(wanted)
        row['reduced'] = shallower(smaller)
        try:
            if row['reduced']:
                return _first_that_runs(scope, config, smaller, row)
        except Exception:
            row['reduced'] = ''  # the model needs its layers: it is tried in full
    return _first_that_runs(scope, config, wanted, row)


def _first_that_runs(
    scope: str, config: Config, wanted: dict[str, Any], row: dict[str, Any]
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """Make one stock step at the smallest of the input sizes at which the model makes one."""
    network, failure = _built(wanted), None
    for size in input_sizes(scope, config):
        try:
            data = synthetic_batch(scope, config, size)
            _step(network, data)
        except Exception as error:
            failure = error
            continue
        row['input'] = edge_length(data)
        return partial(_built, wanted), data
    raise failure


def _built(model: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    network = MODELS.build(copy.deepcopy(model))
    network.init_weights()
    return network.train()


def _try_pruned(build: Callable[[], nn.Module], data: dict[str, Any], row: dict[str, Any]) -> None:
    network = build()
    masks = install_masks(network, sparsity=0.7)
    reasons = Counter(re.sub(r'shared with .*', 'shared', e.reason) for e in masks.excluded)
    row.update(layers=len(masks.layers), blocks=masks.num_blocks, dense=dict(reasons))
    for layer in masks.layers:  # zeros are counted below: only pruning shall make them
        layer.weight.data[layer.weight.data == 0] = 1e-6
    masks.begin(magnitude(masks.layers), temperature=1.0)
    _step(network, data, masks)
    if not bool(masks.importance.grad.isfinite().all() and masks.importance.grad.any()):
        raise FloatingPointError('the gradient of the importance is zero or not finite')
    masks.harden()
    _finite_loss(network, data)
    stock = build()
    with tempfile.TemporaryDirectory() as folder:
        save_plain_checkpoint(network, f'{folder}/pruned.pth')
        state = torch.load(f'{folder}/pruned.pth', weights_only=True)['state_dict']
    stock.load_state_dict(state, strict=True)
    kept, smallest = kept_weights(masks.layers, stock.state_dict())
    if not kept <= masks.budget < kept + smallest:
        raise ArithmeticError(
            f'{kept} weights kept of a budget of {masks.budget:g}; the smallest pruned block has '
            f'{smallest}'
        )


def kept_weights(layers: Sequence[BlockLayer], state: dict[str, Tensor]) -> tuple[int, float]:
    """Count, in a state dict alone, the weights of blocks that are not all zero.

    Returns:
        Their number, and that of the smallest block that is all zero (infinite without one).
    """
    kept, smallest = 0, math.inf
    for layer in layers:
        weight = state[f'{layer.name}.weight' if layer.name else 'weight']
        nonzero = (weight != 0).reshape(layer.view_shape)
        both = torch.stack([nonzero, torch.ones_like(nonzero)]).long()
        for axis, length in enumerate(layer.block, start=1):
            missing = -both.shape[axis] % length
            both = F.pad(both, [0, 0] * (both.ndim - 1 - axis) + [0, missing])
            both = both.unflatten(axis, (-1, length)).sum(axis + 1)
        alive, sizes = both[0] > 0, both[1]
        kept += int(sizes[alive].sum())
        if not alive.all():
            smallest = min(smallest, int(sizes[~alive].min()))
    return kept, smallest


def _step(network: nn.Module, data: dict[str, Any], masks: BlockMasks | None = None) -> None:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    optimizer.zero_grad()  # of an attempt that failed half-way
    _finite_loss(network, data).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    if masks is None:
        optimizer.step()
    else:
        importance_optimizer = torch.optim.Adam([masks.importance], lr=0.02)
        with masks.latent_weights(0.5):
            optimizer.step()
            importance_optimizer.step()
    optimizer.zero_grad()


def _finite_loss(network: nn.Module, data: dict[str, Any]) -> Tensor:
    ready = network.data_preprocessor(copy.deepcopy(data), True)
    loss, _ = network.parse_losses(network._run_forward(ready, mode='loss'))
    if not bool(loss.isfinite()):
        raise FloatingPointError(f'the loss is {float(loss)}')
    return loss


def _describe(model: dict[str, Any]) -> str:
    backbone = model.get('backbone') or model.get('detector', {}).get('backbone') or {}
    kinds = (model.get('type'), backbone.get('type'))
    return ', '.join(str(getattr(kind, '__name__', kind)) for kind in kinds if kind)
