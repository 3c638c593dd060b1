"""Compare pruning methods: run a suite, and write its tables and curves as results come in.

    python tools/compare.py configs/compare/digits.yaml
    python tools/compare.py configs/compare/cifar10.yaml --jobs 4 --only '*/8x8/0.9/*'
    python tools/compare.py configs/compare/cifar10.yaml --dry-run

A suite names tasks, methods, blocks, sparsities and seeds; docs/comparing.md says how to write one.
Every run is a process of tools/train.py with a config of its own. The same command goes on where
it was stopped: what is finished with the same settings is kept, what failed is tried again. Written
are results.csv, results.md and a picture for each task and block.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('suite', help='what is compared, such as configs/compare/digits.yaml')
    add(
        '--work-dir',
        metavar='DIR',
        help='where everything goes; work_dirs/compare/SUITE if not given',
    )
    add('--jobs', type=int, metavar='N',
        help='runs at a time; one for each group of GPUs, or for each core, at most 8')  # fmt: skip
    add('--gpus-per-job', type=int, default=1, metavar='N', help='GPUs that a run sees')
    add('--only', nargs='+', default=['*'], metavar='PATTERN',
        help="runs by name, such as 'resnet14/smart/*'; --dry-run shows the names")  # fmt: skip
    add('--command', metavar='COMMAND',
        help="what trains a config, such as 'bash tools/dist_train.sh {config} 8'; "
        'python tools/train.py if not given')  # fmt: skip
    add('--keep-checkpoints', action='store_true',
        help='of finished pruning runs too; pruned.pth is kept in any case')  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--dry-run', action='store_true', help='list the runs and their states alone')
    what.add_argument('--table-only', action='store_true', help='write tables of what is there')
    return parser.parse_args(args)


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore', module=r'(mmengine|mmpretrain|mmdet|mmseg|mmcv|torch)\b')
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    # What a scheduler sends before it kills must reach the runs too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        is_complete = compared(args, console)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f'tools/compare.py: {error}') from error
    except KeyboardInterrupt:
        console.print('stopped; the same command goes on from here')
        raise SystemExit(130) from None
    if not is_complete:
        raise SystemExit(1)


def compared(args: argparse.Namespace, console: Any) -> bool:
    """Do what the arguments say; whether every chosen run has a result."""
    from mmsmart.compare import JobFolder, environments, jobs_of, read_suite, selected, visible_gpus
    from mmsmart.engine.compare import expect_valid

    for key in ('jobs', 'gpus_per_job'):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f'{key.replace("_", "-")}: {getattr(args, key)} is below 1.')
    suite = read_suite(args.suite)
    every = jobs_of(suite)
    chosen = selected(every, args.only)
    if not args.table_only:
        expect_valid(chosen)
    root = Path(args.work_dir or Path('work_dirs/compare') / suite.name).resolve()
    if args.dry_run:
        for number, job in enumerate(chosen, 1):
            state = JobFolder(root, job).state()
            console.print(f'{number:5} {state:8}{job.name}', markup=False)
        console.print(counted(root, chosen))
        return True
    root.mkdir(parents=True, exist_ok=True)
    report = Report(suite, every, root)
    if not args.table_only:
        slots = environments(args.jobs, visible_gpus(), args.gpus_per_job)
        console.print(f'{suite.name}: {counted(root, chosen)}; {len(slots)} at a time, in {root}')
        run(args, chosen, root, slots, report, console)
    report.write(draw=True)
    states = report.states(chosen)
    changed = f', {states["changed"]} have other settings' if states['changed'] else ''
    console.print(f'{states["done"]} of {len(chosen)} runs are finished, {states["failed"]} failed'
                  f'{changed}; tables: {root / "results.md"}')  # fmt: skip
    return states['done'] == len(chosen)


def run(
    args: argparse.Namespace, chosen: Sequence[Any], root: Path, slots: Any, report: Report,
    console: Any,
) -> None:  # fmt: skip
    """Run what is not finished, and tell how it goes."""
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from mmsmart.compare import JobFolder, expect_result, run_jobs

    words = shlex.split(args.command) if args.command else [
        sys.executable, str(Path(__file__).with_name('train.py').resolve())
    ]  # fmt: skip
    left = [job for job in chosen if JobFolder(root, job).state() != 'done']
    for job in left:
        if job.dense is None:
            JobFolder(root, job).weights()  # or every run would fail of the same
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), Remaining())
    events = run_jobs(left, root, words, slots, lambda job: expect_result(root, job))
    with Progress(*columns, console=console) as progress, closing(events):
        task = progress.add_task('', total=len(left))
        for job, state, record in events:
            if state == 'started':
                progress.update(task, description=job.name)
                continue
            if state == 'held':
                progress.print(f'[yellow]held[/]    {job.name}: another process works on it')
                continue
            progress.advance(task)
            if state == 'failed':
                progress.print(f'[red]failed[/]  {job.name}: {escape(record["reason"])}')
                for line in record['log'][-3:]:
                    progress.print(f'        {line}', markup=False, style='dim')
                if record.get('command'):
                    again = shlex.join(record['command'])
                    progress.print(f'        by hand: {again}', markup=False, style='dim')
            report.write(job)
            if state == 'done':
                if job.method is not None and not args.keep_checkpoints:
                    JobFolder(root, job).drop_checkpoints()
                progress.print(f'[green]done[/]    {job.name}{report.line(job, record)}')


class Report:
    """The files of a comparison, written anew whenever a run has ended."""

    def __init__(self, suite: Any, jobs: Sequence[Any], root: Path) -> None:
        self.suite, self.jobs, self.root = suite, jobs, root
        self.results, self.missing = [], {}

    def write(self, job: Any = None, draw: bool = False) -> None:
        """Write the tables; draw all pictures, or that of a job."""
        from mmsmart.compare import collect, draw_curves, markdown, picture_name, save_csv
        from mmsmart.export import complete_or_absent

        self.results, self.missing = collect(self.root, self.jobs)
        save_csv(self.results, self.root / 'results.csv')
        groups = {(result.task, result.block) for result in self.results}
        for task, block in sorted(groups):
            if draw or (job is not None and (job.task, job.block) == (task, block)):
                mine = [r for r in self.results if (r.task, r.block) == (task, block)]
                picture = self.root / picture_name(task, block)
                draw_curves(mine, list(self.suite.methods), picture)
        text = markdown(self.suite, self.jobs, self.results, self.missing, self.root)
        with complete_or_absent(self.root / 'results.md') as temporary:
            temporary.write_text(text)

    def states(self, jobs: Sequence[Any]) -> Counter[str]:
        """How many runs are in which state; failed is also one whose result can't be used."""
        from mmsmart.compare import JobFolder

        states: Counter[str] = Counter()
        for job in jobs:
            state = JobFolder(self.root, job).state()
            states['failed' if state == 'done' and job.name in self.missing else state] += 1
        return states

    def line(self, job: Any, record: dict[str, Any]) -> str:
        """What is said of a finished job."""
        taken = '' if record.get('seconds') is None else f', {record["seconds"]:.0f} s'
        for r in self.results:
            cell = (r.task, r.method, r.block, r.sparsity, r.seed)
            if cell == (job.task, job.method, job.block, job.sparsity, job.seed):
                dense = '' if r.dense is None else f' (dense {r.dense:.4g})'
                return f': {r.metric} {r.value:.4g}{dense}{taken}'
        return taken


def counted(root: Path, jobs: Sequence[Any]) -> str:
    """How many runs there are, and how many of them are finished."""
    from mmsmart.compare import JobFolder

    dense = sum(job.method is None for job in jobs)
    done = sum(JobFolder(root, job).state() == 'done' for job in jobs)
    return f'{len(jobs)} runs, {dense} dense and {len(jobs) - dense} pruning; {done} finished'


if __name__ == '__main__':
    main()
