"""Measure latency and memory of a model on this machine: dense, pruned, and as ONNX.

    python tools/benchmark.py CONFIG work_dirs/my_run/pruned.pth --onnx
    python tools/benchmark.py CONFIG pruned.pth pruned.onnx --threads 2 --markdown table.md

The first row is the model of the config with random weights: what the others are compared with.
Rounds are interleaved, so that other work on the machine hits all of them alike. Only the raw
forward is timed: backbone, neck and head, without loading images, without post-processing and, in a
two-stage detector, without the RoI head. Zeros in a dense tensor gain nothing in these runtimes;
params and MACs without zeros say what hardware that skips blocks can gain.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='config of the model')
    add('files', nargs='*', metavar='FILE', help='checkpoints, .onnx or .pt2 files of that model')
    add('--onnx', action='store_true', help='measure each checkpoint in ONNX Runtime too')
    add('--shape', type=int, nargs='+', metavar='N',
        help='height and width of an image (one number: a square); by default what the test '
        'pipeline of the config makes')  # fmt: skip
    add('--batch-size', type=int, default=1, metavar='N', help='images at once')
    add('--rounds', type=int, default=20, metavar='N', help='measured rounds')
    add('--threads', type=int, metavar='N', help="CPU threads; torch's default if not given")
    add('--no-memory', action='store_true',
        help='leave the memory out, which takes a new process for each row')  # fmt: skip
    add('--json', metavar='FILE', help='write the figures as JSON')
    add('--markdown', metavar='FILE', help='write the table as Markdown')
    add('--cfg-options', nargs='+', action=DictAction, default={},
        help='override settings of the config, the key-value pair in xxx=yyy format')  # fmt: skip
    return parser.parse_args(args)


def distinct(file: str, files: Sequence[str]) -> str:
    """The file's name, or the whole path where another file has the same name."""
    name = Path(file).name
    return name if [Path(other).name for other in files].count(name) == 1 else file


def steps(files: Sequence[str], onnx: bool) -> int:
    """How often the measurement says what it does: building, exporting, measuring, memory."""
    exported = 1 + sum(Path(file).suffix not in ('.onnx', '.pt2') for file in files) if onnx else 0
    rows = 1 + len(files)
    return rows + exported + 1 + rows + exported


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore', module=r'(mmengine|mmpretrain|mmdet|mmseg|mmcv|torch)\b')
    import torch
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from mmsmart.engine import benchmark
    from mmsmart.export import complete_or_absent

    console, threads = Console(), args.threads or torch.get_num_threads()
    files = {'dense': None, **{distinct(file, args.files): Path(file) for file in args.files}}
    subjects = {
        name: benchmark.Subject(
            Path(args.config), args.cfg_options, file, args.shape, args.batch_size, threads
        )
        for name, file in files.items()
    }
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            Progress(console=console, transient=True, refresh_per_second=4) as progress,
        ):
            task = progress.add_task('', total=steps(args.files, args.onnx))
            rows = benchmark.benchmark(
                subjects, args.rounds, folder if args.onnx else None, not args.no_memory,
                lambda what: progress.update(task, advance=1, description=what),
            )  # fmt: skip
    except (ValueError, FileNotFoundError, ImportError, ArithmeticError) as error:
        raise SystemExit(f'tools/benchmark.py: {error}') from error
    table = Table(
        box=SIMPLE_HEAD,
        title=f'{args.rounds} rounds, {threads} threads, batch size {args.batch_size}; dense has '
        'random weights',
    )
    for heading in benchmark.HEADINGS:
        table.add_column(
            heading, justify='right' if heading else 'left', overflow='fold',
            min_width=None if heading else min(10, max(len(row['name']) for row in rows)),
        )  # fmt: skip
    for row in benchmark.cells(rows):
        table.add_row(*row)
    console.print(table)
    texts = {args.json: json.dumps(rows, indent=2) + '\n', args.markdown: benchmark.markdown(rows)}
    for file, text in texts.items():
        if file:
            with complete_or_absent(file) as temporary:
                temporary.write_text(text)


if __name__ == '__main__':
    main()
