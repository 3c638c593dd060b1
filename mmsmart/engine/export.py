"""What `tools/export.py` does: a config and a checkpoint in, a file that others can run out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmsmart.engine.checkpoints import load_checkpoint
from mmsmart.engine.raw_forward import RawForward, example_input, upstream_settings
from mmsmart.engine.stock_tools import enable_inheritance
from mmsmart.export import (
    complete_or_absent,
    expect_at_most,
    largest_difference,
    save_exported_program,
    save_onnx,
    save_plain_checkpoint,
)
from mmsmart.packed import load_packed, load_packed_meta, save_packed
from mmsmart.pruning_json import read_report
from mmsmart.shrink import read_structure, shrink

SHRUNK = 'mmsmart.ShrunkModel'


def read_config(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config as our train tool does, `mmsmart::` bases included.

    Args:
        path: The config file.
        options: Changes by dotted key, as `--cfg-options` gives them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no model, or does not say whose.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: there is no such config.')
    enable_inheritance()
    config = Config.fromfile(path)
    config.merge_from_dict(options or {})
    if not config.get('model') or not config.get('default_scope'):
        raise ValueError(
            f'{path}: a config with `model` and `default_scope` is needed, such as train.py takes.'
        )
    return config


def load_model(config: Config, checkpoint: str | Path | None = None) -> nn.Module:
    """Build the stock (or shrunk) model in eval mode, on the CPU, with a checkpoint's weights.

    Args:
        config: The config it was trained with.
        checkpoint: `pruned.pth`, a packed-blocks file, any plain checkpoint, one that MMEngine
            saved during a run, or a `shrunk.pth` beside its `structure.json`; weights stay random
            if not given.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it can't be read, is one of another model, or was saved in the search.
    """
    settings = upstream_settings(config)
    settings.pop('pretrained', None)  # only `init_weights` would read it, and mmseg warns of it
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = revert_sync_batchnorm(MODELS.build(settings)).eval()
    structure = config.model.get('structure')  # of mmsmart.ShrunkModel
    if structure is not None:
        shrink(model, read_structure(structure), structure)
    if checkpoint is None:
        return model
    state = {key.removeprefix('module.'): x for key, x in read_checkpoint(checkpoint)[0].items()}
    beside = Path(checkpoint).with_name('structure.json')
    # pruned.pth, of dense shapes, lies beside it too.
    if structure is None and beside.is_file() and _other_shapes(model, state):
        shrink(model, read_structure(beside), beside)
    _load_strictly(model, state, checkpoint)
    return model


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and `meta` of a checkpoint, read with `weights_only=True`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be read, or was saved in the search.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such checkpoint.')
    if path.suffix == '.safetensors':
        return load_packed(path), load_packed_meta(path)
    checkpoint = load_checkpoint(path)
    masks = (checkpoint.get('optimizer') or {}).get('smart', {}).get('masks')
    if masks is not None and masks['state'] == 'soft':
        raise ValueError(
            f'{path}: its masks are soft, because it was saved in the middle of the search. Take '
            'pruned.pth, or a checkpoint of the fine-tune stage; for the dense model, one from '
            'before the search.'
        )
    state = checkpoint.get('state_dict', checkpoint)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: it holds no `state_dict` of tensors.')
    return state, checkpoint.get('meta') or {}


def export_checkpoint(config: Config, checkpoint: str | Path, out: str | Path) -> None:
    """Write a plain checkpoint: weights alone, dense shapes, pruned weights exactly zero."""
    _, meta = read_checkpoint(checkpoint)
    save_plain_checkpoint(load_model(config, checkpoint), out, _kept(meta))


def export_blocks(
    config: Config, checkpoint: str | Path, out: str | Path, report: str | Path | None = None
) -> None:
    """Write the packed-blocks file, and read it back bit for bit.

    Args:
        config: The config of the model.
        checkpoint: As for :func:`load_model`.
        out: The file to write.
        report: `pruning.json` of the run; the one beside the checkpoint if not given.

    Raises:
        FileNotFoundError: If there is no report.
        ValueError: If it is one of another model.
        ArithmeticError: If what is read back differs; the file is not kept.
    """
    report = Path(report or Path(checkpoint).with_name('pruning.json'))
    if not report.is_file():
        raise FileNotFoundError(
            f'{report}: the report of the run says how the weights are cut, and is not there. Name '
            'it: --report PRUNING_JSON.'
        )
    _, meta = read_checkpoint(checkpoint)
    state = load_model(config, checkpoint).state_dict()
    with complete_or_absent(out) as temporary:
        save_packed(state, read_report(report)['layers'], temporary, meta=_kept(meta))
        back = load_packed(temporary, max_bytes=2**62)
        wrong = [key for key, value in state.items() if not _same_bits(value, back.get(key))]
        if wrong or back.keys() != state.keys():
            names = wrong or sorted(back.keys() ^ state.keys())
            raise ArithmeticError(f'{out}: {", ".join(names)} came back changed.')


def export_shrunk(
    config: Config,
    checkpoint: str | Path,
    out: str | Path,
    structure: str | Path | None = None,
    shape: Sequence[int] | None = None,
) -> float:
    """Write the model with its pruned channels cut out, compared with the masked one.

    Three files: the checkpoint, `structure.json` and a config of the same name that builds the
    smaller model for it. They belong into one folder.

    Args:
        config: The config of the model.
        checkpoint: As for :func:`load_model`.
        out: The checkpoint to write.
        structure: `structure.json` of the run; the one beside the checkpoint if not given.
        shape: Size of an image, as for :func:`example_input`.

    Returns:
        Largest difference over all raw outputs, as a share of the output's largest value.

    Raises:
        FileNotFoundError: If there is no structure.
        ValueError: If it is one of another model.
        ArithmeticError: If the smaller model computes something else; nothing is kept.
    """
    source = Path(structure or Path(checkpoint).with_name('structure.json'))
    read = read_structure(source)
    _, meta = read_checkpoint(checkpoint)
    masked = load_model(config, checkpoint)
    shrunk = copy.deepcopy(masked)
    shrink(shrunk, read, source)
    images = example_input(config, shape)
    with torch.no_grad():
        outputs = RawForward(masked)(images)
        difference = largest_difference(outputs, RawForward(shrunk)(images))
    expect_at_most(1e-4, difference, out)
    out = Path(out)
    written = out.with_name('structure.json')
    if written.is_file() and json.loads(written.read_text()) != json.loads(json.dumps(read)):
        raise ValueError(
            f'{written}: the structure of another shrunk model lies there, which could not be '
            'loaded without it. Write each shrunk model to a folder of its own.'
        )
    save_plain_checkpoint(shrunk, out, _kept(meta))
    with complete_or_absent(written) as temporary:
        temporary.write_text(json.dumps(read) + '\n')
    with complete_or_absent(out.with_suffix('.py')) as temporary:
        shrunk_config(config, out).dump(temporary)
    return difference


def shrunk_config(config: Config, checkpoint: Path) -> Config:
    """The config of the shrunk model: for tests, more training, and MMEngine's inference APIs."""
    config = copy.deepcopy(config)
    for key in ('smart', 'runner_type'):
        config.pop(key, None)
    folder = '{{ fileDirname }}'
    config.model = dict(
        type=SHRUNK, model=upstream_settings(config), structure=f'{folder}/structure.json'
    )
    config.load_from = f'{folder}/{checkpoint.name}'
    return config


def export_onnx(
    config: Config,
    checkpoint: str | Path,
    out: str | Path,
    shape: Sequence[int] | None = None,
    dynamic_batch: bool = False,
) -> float:
    """Write the raw forward as ONNX; arguments and value as :func:`mmsmart.export.save_onnx`.

    Args:
        config: The config of the model.
        checkpoint: As for :func:`load_model`.
        out: The file to write.
        shape: Size of an image, as for :func:`example_input`.
        dynamic_batch: Whether the file takes any number of images at once.
    """
    model, images = RawForward(load_model(config, checkpoint)), example_input(config, shape)
    return save_onnx(model, images, out, model.output_names(images), dynamic_batch)


def export_pt2(
    config: Config, checkpoint: str | Path, out: str | Path, shape: Sequence[int] | None = None
) -> float:
    """Write the raw forward as a graph of `torch.export`; arguments as :func:`export_onnx`."""
    model, images = RawForward(load_model(config, checkpoint)), example_input(config, shape)
    return save_exported_program(model, images, out)


def _kept(meta: dict[str, Any]) -> dict[str, Any]:
    """What a run notes of itself stays behind; what the classes are goes with the weights."""
    return {key: meta[key] for key in ('dataset_meta',) if meta.get(key)}


def _other_shapes(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return any(
        key in state and state[key].shape != x.shape for key, x in model.state_dict().items()
    )


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    differences = list(_differences(model.state_dict(), state))
    if differences:
        more = f', and {len(differences) - 3} more' if len(differences) > 3 else ''
        raise ValueError(
            f'{path}: a checkpoint of another model than the config describes: '
            f'{"; ".join(differences[:3])}{more}.'
        )
    model.load_state_dict(state)


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> Iterator[str]:
    for key, value in own.items():
        if key not in state:
            yield f'{key} is missing'
        elif state[key].shape != value.shape:
            shapes = tuple(state[key].shape), tuple(value.shape)
            yield f'{key} is {shapes[0]} in the checkpoint and {shapes[1]} in the model'
    yield from (f'{key} is not in the model' for key in state if key not in own)


def _same_bits(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
