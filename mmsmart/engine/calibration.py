"""What is measured by running the model: positions of its layers, norms of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine import dist
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmsmart.budget import count_positions
from mmsmart.engine.random_state import preserved_random_state
from mmsmart.importance import activation, input_norms, magnitude
from mmsmart.masking import BlockMasks


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


def first_importance(
    runner: Runner, model: nn.Module, masks: BlockMasks, init: str, batches: int
) -> Tensor:
    """First importance, from the weights and, if asked, from activations of training batches.

    The batches come from a loader of their own, so that the order of the training data does not
    change. Every process of a distributed run gets the same result.
    """
    if init == 'magnitude':
        return magnitude(masks.layers)
    loader = runner.train_dataloader
    # A loader with a batch sampler, such as detectors have, knows no batch size of its own.
    batch_size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    calibration = DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=DefaultSampler(loader.dataset, shuffle=True, seed=0),
        collate_fn=loader.collate_fn,
    )
    with evaluating(model), input_norms(masks.layers) as norms:
        for _, batch in zip(range(batches), calibration):
            data = model.data_preprocessor(batch, True)
            model._run_forward(data, mode='loss')
    for name, norm in norms.items():  # each process has seen its own share of the images
        squares = norm.square()
        dist.all_reduce(squares, op='mean')
        norms[name] = squares.sqrt()
    return activation(masks.layers, norms)
