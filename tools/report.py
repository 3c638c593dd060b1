"""Draw a run, finished or still going, as one HTML file; name several runs to compare them.

    python tools/report.py work_dirs/my_run
    python tools/report.py work_dirs/smart work_dirs/magnitude --out comparison.html
    python tools/report.py work_dirs/my_run --layers 'backbone.layer4.*' --metric coco/bbox_mAP_50

The file holds its pictures, in light and dark, and fetches nothing: it can be mailed. The pictures
are also written as PNG, into the folder of the file's name. What each of them tells is said in
docs/report.md. A run still going is drawn as far as it has come; run the command again for more.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PICTURES = 10  # five, on two grounds


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('work_dirs', nargs='+', metavar='WORK_DIR', help='folder of a run; several are compared')
    add('--out', metavar='FILE',
        help='HTML file to write; report.html in WORK_DIR if not given, for several runs '
        'comparison.html in the first')  # fmt: skip
    add('--layers', nargs='+', default=[], metavar='PATTERN',
        help='layers whose masks are drawn, shell patterns; the largest if not given')  # fmt: skip
    add('--metric', metavar='NAME',
        help="metric that is drawn, as it is called in the log; the task's usual one if not "
        'given')  # fmt: skip
    return parser.parse_args(args)


def names_of(work_dirs: Sequence[str]) -> list[str]:
    """As few of the last parts of each path as tell all of them apart."""
    parts = [Path(folder).resolve().parts for folder in work_dirs]
    count = 1
    while count < max(map(len, parts)) and len({part[-count:] for part in parts}) < len(parts):
        count += 1
    return ['/'.join(part[-count:]) for part in parts]


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore', module=r'(mmengine|torch)\b')
    console = Console()
    default = 'report.html' if len(args.work_dirs) == 1 else 'comparison.html'
    out = Path(args.out or Path(args.work_dirs[0]) / default)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task('loading', total=len(args.work_dirs) + PICTURES)
            from mmsmart.engine.run_log import read_run
            from mmsmart.html_report.page import write_report

            def step(what: str) -> None:
                progress.update(task, advance=1, description=what)

            runs = []
            for folder, name in zip(args.work_dirs, names_of(args.work_dirs)):
                step(f'reading {name}')
                runs.append(read_run(folder, name))
            typed = shlex.join([os.path.basename(sys.executable), *sys.argv])
            files = write_report(
                runs, out, args.layers, args.metric, typed,
                lambda picture: step(f'drawing {picture}'),
            )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'tools/report.py: {error}') from error
    console.print(f'{out} ({out.stat().st_size / 1e6:.1f} MB)', soft_wrap=True)
    if len(files) > 1:
        console.print(f'{files[1].parent}/ ({len(files) - 1} pictures)', soft_wrap=True)


if __name__ == '__main__':
    main()
