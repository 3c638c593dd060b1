"""Several processes that train one model: the same masks in each, with GPUs or without."""

from __future__ import annotations

import datetime
from typing import Any

import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.runner import Runner
from torch import Tensor

from mmsmart.masking import BlockMasks

_WHOLE = (
    'FSDP, DeepSpeed and ColossalAI cut weights into shards that no block fits into. Leave '
    "`strategy` and FlexibleRunner out (with the base file, runner_type is 'mmsmart.SmartRunner') "
    'and start with tools/dist_train.sh: DDP keeps whole weights in every process.'
)
# What has to agree, in the order of `_fingerprint`.
_COMPARED = ('state', 'temperature', 'budget', 'importance', 'mask')


def refuse_strategies(runner: Any) -> None:
    """Refuse MMEngine's `FlexibleRunner`, under which the parts named one by one may find us.

    Raises:
        ValueError: For another runner than `Runner` and its kin.
    """
    if not isinstance(runner, Runner):
        strategy = type(getattr(runner, 'strategy', None)).__name__
        raise ValueError(
            f'runner_type: {type(runner).__name__} (strategy {strategy}) is not supported: it '
            f'loads weights before a hook may look at them. {_WHOLE}'
        )


def refuse_shards(key: str, written: Any) -> None:
    """Refuse a model wrapper, or a strategy, that cuts weights into shards.

    Args:
        key: Key of the config.
        written: What the config has there.

    Raises:
        ValueError: For anything that is not DDP.
    """
    kind = written.get('type') if isinstance(written, dict) else written
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', type(kind).__name__)
    if key == 'strategy' or 'FullySharded' in name or 'DeepSpeed' in name:
        raise ValueError(f'{key}: {name} is not supported. {_WHOLE}')


def start_on_cpus(launcher: str, settings: dict[str, Any]) -> None:
    """Join the other processes where there is no GPU; MMEngine would ask for one by its number.

    Args:
        launcher: As of `tools/train.py`; only that of torch (`tools/dist_train.sh`) starts without
            GPUs.
        settings: `env_cfg.dist_cfg`.

    Raises:
        ValueError: For another launcher.
    """
    if dist.is_distributed():
        return
    if launcher != 'pytorch':
        raise ValueError(
            f'launcher: {launcher!r} needs a GPU for every process, and torch sees none. Without '
            'GPUs start with tools/dist_train.sh.'
        )
    timeout = settings.get('timeout')
    more = {} if timeout is None else {'timeout': datetime.timedelta(seconds=timeout)}
    torch.distributed.init_process_group('gloo', **more)


def without_gpus() -> bool:
    return get_device() == 'cpu'


def same_everywhere(values: Tensor) -> Tensor:
    """The first process's values, in every process.

    They are the same up to rounding before, since they come of gradients that are averaged over
    processes. But a GPU adds up in an order of its own each time, and a last bit more can move a
    block over the threshold.
    """
    dist.broadcast(values)
    return values


def expect_agreement(masks: BlockMasks, when: str) -> None:
    """Compare the masks of all processes: five numbers of each, whatever the size of the network.

    Args:
        masks: Those of this process.
        when: What the error message says of the moment.

    Raises:
        RuntimeError: In every process, if one has another state, temperature, budget, importance or
            mask than the first.
    """
    if dist.get_world_size() == 1:
        return
    rows = torch.stack(dist.all_gather(_fingerprint(masks)))
    differing = rows != rows[0]
    if bool(differing.any()):
        ranks = differing.any(1).nonzero().flatten().tolist()
        what = [name for name, other in zip(_COMPARED, differing.any(0).tolist()) if other]
        raise RuntimeError(
            f'ranks: {when} rank {", ".join(map(str, ranks))} has another {" and ".join(what)} of '
            'its masks than rank 0. Likely causes: (a) a hook or model wrapper that steps weights '
            'in some processes only, (b) checkpoints that differ between machines, (c) GPUs of '
            'different kinds.'
        )


def _fingerprint(masks: BlockMasks) -> Tensor:
    numbers = torch.tensor([masks.temperature or 0.0, masks.budget], dtype=torch.float64)
    state = ('dense', 'soft', 'hard').index(masks.state)
    sums = [_checksum(masks.importance.detach()), _checksum(masks.mask())]
    return torch.tensor([state, *numbers.view(torch.int64).tolist(), *sums])


def _checksum(values: Tensor) -> int:
    """Differs when a bit of float32 values does, or two of them change places."""
    bits = values.detach().contiguous().view(torch.int32).long()
    places = torch.arange(len(bits), device=bits.device) % 65_521 + 1
    return int((bits * places).sum())
