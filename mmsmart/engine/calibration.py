"""What is learnt by running the model: positions and ties of its layers, norms of their inputs.

And statistics of its BatchNorm layers, which are learnt anew when the masks turn hard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from mmengine import dist
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmsmart.cost import count_positions
from mmsmart.engine.random_state import preserved_random_state
from mmsmart.engine.raw_forward import RawForward
from mmsmart.importance import activation, contributions, gradient, input_norms, magnitude
from mmsmart.masking import BlockMasks

# Pixels at which a network is followed where that is enough: large graphs take seconds and GiBs.
_SMALL = 128


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients, and nothing random is used up."""
    was_training = model.training
    model.eval()
    try:
        with preserved_random_state(), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def layer_positions(runner: Runner, model: nn.Module) -> dict[str, int]:
    """Positions of every layer in the prediction for the first validation (or training) image."""
    loader = runner.train_dataloader if runner.val_loop is None else runner.val_dataloader
    with evaluating(model):
        batch = loader.collate_fn([loader.dataset[0]])
        return count_positions(model, lambda: model.val_step(batch))


def traced(
    model: nn.Module,
    block: Sequence[int] | str,
    needs_macs: bool,
    shape: Sequence[int],
    positions: dict[str, int] | None = None,
) -> dict[str, Any]:
    """What :func:`mmsmart.install_masks` needs to know of a forward pass: `positions`, `forward`.

    Args:
        model: The model.
        block: `smart.block`; coupled channels need a forward pass to follow.
        needs_macs: Whether MACs are budgeted, which need positions.
        shape: `(height, width)` of an image.
        positions: Positions, if they are known; they are counted on one image otherwise.
    """
    height, width = shape
    device = next(model.parameters()).device

    def image(height: int, width: int) -> Tensor:
        return torch.zeros(1, 3, height, width, device=device).normal_(
            generator=torch.Generator(device).manual_seed(0)
        )

    found: dict[str, Any] = {}
    if needs_macs:
        if positions is None:
            with evaluating(model):
                positions = count_positions(model, lambda: RawForward(model)(image(height, width)))
        found['positions'] = positions
    if block == 'channel':
        # The ties are the same for any size, but some models take one size only.
        sizes = [image(_SMALL, _SMALL)] if min(height, width) > _SMALL else []
        sizes = [*sizes, image(height, width)]
        with evaluating(model):
            example = next(x for x in sizes if x is sizes[-1] or _takes(model, x))
        found['forward'] = lambda net: RawForward(net, auxiliary=True)(example)
    return found


def _takes(model: nn.Module, images: Tensor) -> bool:
    try:
        RawForward(model, auxiliary=True)(images)
    except Exception:  # whatever a model says to a size that is not its own
        return False
    return True


def traced_in(runner: Runner, model: nn.Module, block: Any, needs_macs: bool) -> dict[str, Any]:
    """:func:`traced` for the first validation (or training) image of a run."""
    if block != 'channel' and not needs_macs:
        return {}
    loader = runner.train_dataloader if runner.val_loop is None else runner.val_dataloader
    with evaluating(model):
        batch = loader.collate_fn([loader.dataset[0]])
        images = model.data_preprocessor(batch)['inputs']
    positions = layer_positions(runner, model) if needs_macs else None
    return traced(model, block, needs_macs, images.shape[-2:], positions)


def first_importance(
    runner: Runner, model: nn.Module, masks: BlockMasks, init: str, batches: int
) -> Tensor:
    """First importance of the name that `smart.importance.init` gives.

    'magnitude' knows the weights, 'activation' and 'gradient' some training batches too; 'random'
    and 'zero' know nothing. All but 'zero' have standard deviation 1 over the network.

    The batches come from a loader of their own, so that the order of the training data does not
    change. Every process of a distributed run gets the same result.
    """
    if init == 'magnitude':
        return masks.plan.first(magnitude(masks.layers))
    if init in ('random', 'zero'):
        drawn = torch.randn(masks.num_blocks)
        return drawn if init == 'random' else torch.zeros_like(drawn)
    if init == 'gradient':
        return gradient(_squared_contributions(runner, model, masks, batches))
    return masks.plan.first(activation(masks.layers, _norms(runner, model, masks, batches)))


def _norms(runner: Runner, model: nn.Module, masks: BlockMasks, batches: int) -> dict[str, Tensor]:
    """Norms of the layers' inputs over all processes, each of which has seen its own images."""
    with evaluating(model), input_norms(masks.layers) as norms:
        for batch in _training_batches(runner, batches):
            model._run_forward(model.data_preprocessor(batch, True), mode='loss')
    for name, norm in norms.items():
        squares = norm.square()
        dist.all_reduce(squares, op='mean')
        norms[name] = squares.sqrt()
    return norms


def _squared_contributions(
    runner: Runner, model: nn.Module, masks: BlockMasks, batches: int
) -> Tensor:
    """Mean over batches of the squared contributions of every block, `(num_blocks,)`.

    Those of a batch are averaged over processes before they are squared: several processes with a
    part of each batch find what one finds with the whole.
    """
    squares = torch.zeros(masks.num_blocks, device=masks.layers[0].weight.device)
    with evaluating(model), torch.enable_grad():
        for batch in _training_batches(runner, batches):
            losses = model._run_forward(model.data_preprocessor(batch, True), mode='loss')
            loss = model.parse_losses(losses)[0]
            if not loss.requires_grad:
                raise ValueError(
                    "smart.importance.init: 'gradient' needs a loss with a gradient, and that of "
                    f'{type(model).__name__} in evaluation mode has none. Choose '
                    "init='activation', or 'magnitude', which needs no data."
                )
            loss.backward()
            of_batch = masks.plan.average(contributions(masks.layers))
            dist.all_reduce(of_batch, op='mean')
            squares += of_batch.square() / batches
            model.zero_grad()
    return squares


def _training_batches(runner: Runner, count: int, whole: bool = False) -> Iterator[Any]:
    """Some batches from a loader of their own: the order of the training data does not change.

    Args:
        runner: The runner.
        count: How many, if there are as many.
        whole: Whether a last batch of fewer images is left out.
    """
    loader = runner.train_dataloader
    # A loader with a batch sampler, such as detectors have, knows no batch size of its own.
    batch_size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    sampler = DefaultSampler(loader.dataset, shuffle=True, seed=0)
    batches = DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        drop_last=whole and len(sampler) >= batch_size,
    )
    return islice(batches, count)


def recalibrate(
    runner: Runner, model: nn.Module, batches: int, averages: Sequence[BaseAveragedModel] = ()
) -> None:
    """Measure the running statistics of BatchNorm anew: plain averages over training batches.

    Only layers that are in training mode, whose statistics training moves too; those that are kept
    in eval mode, as by `norm_eval` and `frozen_stages`, stay as they are. Weights stay too, nothing
    random is used up, and every process of a distributed run gets the same result.

    Args:
        runner: The runner, whose training data it is.
        model: The model that is trained.
        batches: Number of batches; 0 for leaving the statistics alone.
        averages: Moving averages of the model; those with statistics of their own get their own.
    """
    names = [name for name, module in model.named_modules() if _moves_statistics(module)]
    if not batches or not names:
        return
    for network in (model, *(x.module for x in averages if x.update_buffers)):
        norms = [network.get_submodule(name) for name in names]
        with evaluating(network), _plain_averages(norms):
            for batch in _training_batches(runner, batches, whole=True):
                network._run_forward(network.data_preprocessor(batch, True), mode='loss')
        for norm in norms:  # each process has seen its own share of the images
            dist.all_reduce(norm.running_mean, op='mean')
            dist.all_reduce(norm.running_var, op='mean')
    runner.logger.info(
        f'mmsmart: statistics of {len(names)} BatchNorm layers were measured anew over {batches} '
        'batches.'
    )


def _moves_statistics(module: nn.Module) -> bool:
    # Layers of mmcv have a class of their own. Those of other kinds, InstanceNorm, can't average.
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        type(module).__name__ == 'SyncBatchNorm'
    )
    return is_norm and module.training and module.running_mean is not None


@contextmanager
def _plain_averages(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, BatchNorm layers collect statistics from nothing, every batch counting the same."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
