"""Try SMART on every distinct model of the stock configs, and write a table of what works.

Each model is tried in a process of its own, with a limit on time and memory: first as it is, for
one training step on synthetic data, then pruned: one step of the search, hardening, export, and
loading with `strict=True` into a stock model built anew. Nothing is downloaded. Rows are appended
to a file as they come; `--resume` goes on after the last one.

    python tools/sweep.py --packages mmdet --match 'yolox/*'
    python tools/sweep.py --resume --write docs/compatibility.md
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--packages', nargs='+', choices=PACKAGES, default=PACKAGES, help='whose configs')
    add('--match', default='*', metavar='PATTERN', help="shell pattern, such as 'yolox/*'")
    add('--limit', type=int, metavar='N', help='try at most N models, spread over architectures')
    add('--timeout', type=float, default=60, metavar='S',
        help='seconds for the stock step; the pruned part may take three times it')  # fmt: skip
    add('--memory', type=float, default=8, metavar='GB', help='limit for each model')
    add('--jobs', type=int, default=1, metavar='N', help='models tried at the same time')
    add('--rows', default='work_dirs/sweep.jsonl', help='file the rows are appended to')
    add('--resume', action='store_true', help='keep the rows that are there, try the others')
    add('--write', metavar='FILE', help='write the table as Markdown, docs/compatibility.md')
    return parser.parse_args(args)


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    from mmsmart.engine.sweep.page import markdown
    from mmsmart.engine.sweep.processes import tried
    from mmsmart.engine.sweep.stock_models import distinct_models
    from mmsmart.export import complete_or_absent

    console = Console()
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        models = [
            distinct_models(
                package, args.match,
                lambda paths, label=f'reading configs of {package}': progress.track(
                    paths, description=label
                ),
            )
            for package in args.packages
        ]  # fmt: skip
        models = in_turn(models)
        file = Path(args.rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(file) if args.resume else []
        with complete_or_absent(file) as temporary:  # ends with a whole line from here on
            temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        done = {(row['package'], row['config']) for row in rows}
        left = [m for m in models[: args.limit] if (m.package, m.config) not in done]
        task = progress.add_task('trying models', total=len(left))
        with file.open('a') as out:
            for row in tried(left, args.jobs, args.timeout, args.memory):
                rows.append(row)
                out.write(json.dumps(row) + '\n')
                out.flush()
                colour = {'ok': 'green', 'SMART fails': 'red'}.get(row['outcome'], 'yellow')
                progress.print(
                    f'[{colour}]{row["outcome"]:11}[/] {row["package"]} {row["config"]} '
                    f'[dim]{row["seconds"]:.0f} s[/]'
                )
                if row['reason']:
                    progress.print(f'            {row["reason"]}', markup=False, style='dim')
                progress.advance(task)
    wanted = {(m.package, m.config) for m in models}
    rows = [row for row in rows if (row['package'], row['config']) in wanted]
    for package in args.packages:
        mine = [row['outcome'] for row in rows if row['package'] == package]
        console.print(
            f'{package}: {mine.count("ok")} ok, {mine.count("SMART fails")} fail with SMART, '
            f'{mine.count("stock fails")} fail without it'
        )
    if args.write:
        Path(args.write).write_text(markdown(rows, models))
        console.print(f'table: {args.write}')


def in_turn(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Merge lists so that any beginning holds the same share of each."""
    placed = [((i + 0.5) / len(some), item) for some in lists for i, item in enumerate(some)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; a last line that was cut off by a kill is dropped."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


if __name__ == '__main__':
    main()
