"""How fast a model runs here and what memory it takes: dense, masked, shrunk, in other runtimes."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmsmart.cost import count_positions
from mmsmart.engine.export import load_model, read_config
from mmsmart.engine.raw_forward import RawForward, example_input
from mmsmart.export import save_onnx


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate in milliseconds; half of all rounds lie between `low` and `high`.

    `speedup` is how many times as fast as the first candidate it is: the median over rounds, each
    of which compares two runs that followed each other closely.
    """

    median: float
    low: float
    high: float
    speedup: float


def measure(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 20, warmup: int = 2
) -> dict[str, Timing]:
    """Time candidates side by side: every round runs each of them once, beginning with another.

    What slows the machine down for a while slows all of them down, and nobody always comes first.

    Args:
        candidates: What to run, by name; the first is what the others are compared with.
        rounds: Number of measured rounds, 2 or more.
        warmup: Number of rounds before them that are not measured.

    Raises:
        ValueError: If there are no candidates, or too few rounds.

    Example:
        >>> timings = measure({'short': lambda: time.sleep(1e-3), 'long': lambda: time.sleep(4e-3)})
        >>> timings['short'].speedup, timings['long'].speedup < 0.5
        (1.0, True)
    """
    if not candidates or rounds < 2:
        raise ValueError(
            f'rounds: expected 2 or more, and at least one candidate; got {rounds} rounds of '
            f'{len(candidates)}.'
        )
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            candidates[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: _timing(seconds[name], seconds[names[0]]) for name in names}


def _timing(seconds: Sequence[float], reference: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles((1000 * s for s in seconds), n=4, method='inclusive')
    speedup = statistics.median(other / own for own, other in zip(seconds, reference))
    return Timing(median, low, high, speedup)


@dataclass(frozen=True)
class Subject:
    """One thing to measure; another process can build it anew from this.

    Args:
        config: Path of the config.
        options: `--cfg-options` for it.
        file: A checkpoint, an ONNX model (`.onnx`) or a graph of `torch.export` (`.pt2`); random
            weights if None.
        shape: Size of an image; that of the config's test pipeline if None.
        batch_size: Images at once.
        threads: CPU threads.
    """

    config: Path
    options: dict[str, Any]
    file: Path | None
    shape: Sequence[int] | None = None
    batch_size: int = 1
    threads: int = 1

    def read(self) -> Config:
        return read_config(self.config, self.options)

    def model(self) -> nn.Module | None:
        """The model in eager mode; None for a file that holds a graph of its own."""
        if self.file is not None and self.file.suffix in ('.onnx', '.pt2'):
            return None
        return RawForward(load_model(self.read(), self.file))

    def build(self) -> Callable[[], Any]:
        """Something to call that runs one forward pass.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if self.file is not None and not self.file.is_file():
            raise FileNotFoundError(f'{self.file}: there is no such file.')
        images = example_input(self.read(), self.shape)
        images = images.repeat(self.batch_size, 1, 1, 1)
        if self.file is not None and self.file.suffix == '.onnx':
            return self._onnx(images)
        torch.set_num_threads(self.threads)
        model = self.model() or torch.export.load(self.file).module()

        @torch.inference_mode()
        def run() -> Any:
            return model(images)

        return run

    def _onnx(self, images: torch.Tensor) -> Callable[[], Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # Threads that wait busily would take the processor from the candidate that comes next.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        session = onnxruntime.InferenceSession(
            self.file, options, providers=['CPUExecutionProvider']
        )
        feed = {session.get_inputs()[0].name: images.numpy()}
        return lambda: session.run(None, feed)


def peak_memory(subject: Subject) -> float | None:
    """Megabytes that weights and a forward pass take at their peak, in a fresh process.

    It is the largest resident set during three passes, less what the process held with all
    libraries loaded and no weights. Linux alone tells it; elsewhere None.
    """
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_peak_memory_here, (subject,))


def _peak_memory_here(subject: Subject) -> float | None:
    warnings.simplefilter('ignore')  # they were shown, or filtered, where this process came from
    status, reset = Path('/proc/self/status'), Path('/proc/self/clear_refs')
    if not reset.exists():
        return None
    config = subject.read()
    importlib.import_module(f'{config.default_scope}.models')
    if importlib.util.find_spec('onnxruntime'):
        importlib.import_module('onnxruntime')
    torch.set_num_threads(subject.threads)
    with torch.inference_mode():
        nn.Conv2d(16, 16, 3)(torch.zeros(1, 16, 16, 16))  # loads what torch loads lazily
    gc.collect()
    before = _kilobytes(status, 'VmRSS')
    run = subject.build()
    gc.collect()
    reset.write_text('5')  # forgets the peak; that of loading is not that of running
    for _ in range(3):
        run()
    return (_kilobytes(status, 'VmHWM') - before) / 1e3


def _kilobytes(status: Path, key: str) -> int:
    return int(re.search(rf'^{key}:\s*(\d+) kB', status.read_text(), flags=re.M)[1])


def weights_and_macs(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Parameters of a model and MACs of one image, in all and without zeros, as in `pruning.json`.

    Zeros and MACs are those of convolutions and linear layers.
    """
    with torch.no_grad():
        positions = count_positions(model, lambda: model(images[:1]))
        modules = dict(model.named_modules())
        layers = [(modules[name].weight, used) for name, used in positions.items()]
        zeros = [weight.numel() - int(weight.count_nonzero()) for weight, _ in layers]
        params = sum(parameter.numel() for parameter in model.parameters())
        macs = sum(weight.numel() * used for weight, used in layers)
        return {
            'params': params,
            'nonzero_params': params - sum(zeros),
            'macs': macs,
            'nonzero_macs': macs - sum(n * used for n, (_, used) in zip(zeros, layers)),
        }


def benchmark(
    subjects: Mapping[str, Subject],
    rounds: int = 20,
    onnx_folder: str | Path | None = None,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure subjects against each other; a row each, times relative to the first.

    Args:
        subjects: What to measure, by name.
        rounds: Rounds of :func:`measure`.
        onnx_folder: Where to write each model as ONNX, which is then measured too; None for not.
        memory: Whether to start a process for each to measure its memory.
        say: Is told what is being done.
    """
    subjects, counts = dict(subjects), {}
    for name, subject in list(subjects.items()):
        say(f'building {name}')
        model = subject.model()
        if model is None:
            continue
        images = example_input(subject.read(), subject.shape).repeat(subject.batch_size, 1, 1, 1)
        counts[name] = weights_and_macs(model, images)
        if onnx_folder is not None:
            say(f'exporting {name} to ONNX')
            file = Path(onnx_folder) / f'{len(counts)}.onnx'
            save_onnx(model, images, file, model.output_names(images))
            subjects[f'{name} as ONNX'] = replace(subject, file=file)
            counts[f'{name} as ONNX'] = counts[name]
        del model
    runs = {name: subject.build() for name, subject in subjects.items()}
    say(f'measuring {rounds} rounds of {len(runs)}')
    timings = measure(runs, rounds)
    del runs
    rows = []
    for name, subject in subjects.items():
        say(f'memory of {name}')
        row = {'name': name, **counts.get(name, {}), 'file_mb': None, 'memory_mb': None}
        if subject.file is not None:
            row['file_mb'] = subject.file.stat().st_size / 1e6
        if memory:
            row['memory_mb'] = peak_memory(subject)
        rows.append({**row, **asdict(timings[name])})
    return rows


HEADINGS = ('', 'params', 'MACs', 'file\nMB', 'ms\n(middle half)', 'speed', 'memory\nMB')


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows as text under `HEADINGS`, some of it in two lines.

    Shares are of the first row's parameters and MACs. What is zero does not count as a parameter
    or MAC here: it is what a runtime could leave out.
    """
    first = rows[0]

    def share(row: Mapping[str, Any], key: str) -> str:
        if row.get(f'nonzero_{key}') is None or not first.get(key):
            return ''
        amount, part = row[f'nonzero_{key}'], row[f'nonzero_{key}'] / first[key]
        return f'{amount / 1e6:,.2f} M\n({part:.0%})'

    return [
        [
            row['name'],
            share(row, 'params'),
            share(row, 'macs'),
            '' if row['file_mb'] is None else f'{row["file_mb"]:.2f}',
            f'{_short(row["median"])}\n({_short(row["low"])}-{_short(row["high"])})',
            f'{row["speedup"]:.2f}x',
            '' if row['memory_mb'] is None else f'{row["memory_mb"]:.0f}',
        ]
        for row in rows
    ]


def _short(milliseconds: float) -> str:
    return f'{milliseconds:.2f}' if milliseconds < 10 else f'{milliseconds:.1f}'


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADINGS, ['---', *['---:'] * (len(HEADINGS) - 1)], *cells(rows)]
    return ''.join(f'| {" | ".join(line)} |'.replace('\n', ' ') + '\n' for line in lines)
