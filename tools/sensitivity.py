"""Measure, without training, how the loss rises with what is pruned, and propose a sparsity.

    python tools/sensitivity.py CONFIG CHECKPOINT --out work_dirs/sensitivity
    python tools/sensitivity.py CONFIG CHECKPOINT --allow 5% --resource macs --resume

Each layer alone keeps its top blocks at several densities, then the whole net at several
sparsities, by the first importance: as the config has it, and with rules that protect the most
sensitive layers. `--allow 0.1` lets the loss rise by 0.1, `--allow 5%` by a twentieth
of the dense loss. Batch norms take their statistics anew from some of the images; nothing is
trained, so what is proposed is a lower bound of what a run reaches. Rows are appended to
sensitivity.jsonl as they come; `--resume` goes on after the last one.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    from mmengine.config import DictAction

    from mmsmart.budget import RESOURCES
    from mmsmart.sensitivity import Grid

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, grid = parser.add_argument, Grid()
    add('config', help='config of the network, with or without `smart`')
    add('checkpoint', nargs='?', help='its trained weights; `load_from` of the config otherwise')
    add('--images', type=int, default=256, metavar='N', help='images the loss is taken over')
    add('--densities', type=float, nargs='+', default=grid.densities, metavar='D',
        help='shares of a layer that stay')  # fmt: skip
    add('--sparsities', type=float, nargs='+', default=grid.sparsities, metavar='S',
        help='shares of the whole net that leave')  # fmt: skip
    add('--allow', default='0.1', metavar='RISE',
        help='rise of the loss: a number, or a share of the dense loss such as 5%%')  # fmt: skip
    add('--resource', nargs='+', choices=RESOURCES, default=grid.resources,
        help='what sparsities of the whole net count')  # fmt: skip
    add('--out', default='work_dirs/sensitivity', metavar='DIR', help='where the files go')
    add('--resume', action='store_true', help='keep the rows that are there, measure the others')
    add('--cfg-options', nargs='+', action=DictAction, default={},
        help='override settings of the config, the key-value pair in xxx=yyy format')  # fmt: skip
    return parser.parse_args(args)


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore', module=r'(mmengine|mmpretrain|mmdet|mmseg|mmcv|torch)\b')
    from rich.console import Console

    console = Console()
    try:
        measured(args, console)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SystemExit(f'tools/sensitivity.py: {error}') from error


def measured(args: argparse.Namespace, console: Any) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from mmsmart.engine.export import read_config
    from mmsmart.engine.sensitivity import TrainedNet, measure
    from mmsmart.export import complete_or_absent
    from mmsmart.report import save_report
    from mmsmart.sensitivity import (
        Grid,
        allowed_rise,
        draw_sensitivity,
        rows_of,
        smart_text,
        summary,
    )

    grid = Grid(args.densities, args.sparsities, args.resource)
    allowed_rise(args.allow, 1.0)
    config = read_config(args.config, args.cfg_options)
    with console.status('loading the network and its images'):
        net = TrainedNet(config, args.checkpoint, args.images)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / 'sensitivity.jsonl'
    known = rows_of(file, net.settings) if args.resume else []
    with complete_or_absent(file) as temporary:  # ends with a whole line from here on
        lines = [{'settings': net.settings}, *known]
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    rows, there = [], {json.dumps(row) for row in known}
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console) as progress, file.open('a') as lines:
        task = progress.add_task('', total=grid.size(len(net.parts)))
        for row in measure(net, grid, args.allow, known):
            rows.append(row)
            text = json.dumps(row)
            if text not in there:
                lines.write(text + '\n')
                lines.flush()
            what = row.get('name') or row.get('resource') or 'dense'
            progress.update(task, advance=1, description=what)
    shares = {resource: net.shares(resource) for resource in grid.resources}
    report = {'images': net.images, 'data': net.data, **summary(rows, shares, args.allow)}
    save_report(report, out / 'sensitivity.json')
    draw_sensitivity(report, out / 'sensitivity.png')
    for table in tables(report):
        console.print(table)
    for resource in grid.resources:
        text = smart_text(report['proposals'][resource], **net.asked, resource=resource)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f'{file}, sensitivity.json and sensitivity.png are in {out}.')


def tables(report: dict[str, Any]) -> list[Any]:
    """One row a layer, and one a resource, as tables for `rich.print`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    dense = report['loss']
    layers = Table(
        box=SIMPLE_HEAD,
        title=f'rise of the loss ({dense:.4g} dense, {report["images"]} {report["data"]} images) '
        'when one layer alone is thinned',
    )
    layers.add_column('layer', overflow='fold', min_width=24)
    for point in report['layers'][0]['losses']:
        layers.add_column(f'{point["density"]:g}', justify='right')
    layers.add_column('bears', justify='right')
    for row in report['layers']:
        cells = []
        for point in row['losses']:
            rise = float('inf') if point['loss'] is None else point['loss'] - dense
            even = report['allowed'] / len(report['layers'])
            colour = 'green' if rise <= even else 'yellow' if rise <= report['allowed'] else 'red'
            cells.append(f'[{colour}]{rise:+.2g}[/]')
        layers.add_row(row['name'], *cells, f'{row["lowest_density"]:g}')
    net = Table(
        box=SIMPLE_HEAD,
        title=f'the whole net, a rise of {report["allowed"]:.3g} allowed; without training, so a '
        'lower bound of what a run reaches',
    )
    net.add_column('resource')
    for name in ('sparsity', 'layers protected'):
        net.add_column(name, justify='right')
    for resource, found in report['proposals'].items():
        sparsity = f'{found["sparsity"]:.0%}'
        sparsity += {
            'measured': ' or more (the highest of --sparsities)',
            'floors': ' (as far as the protected layers let it)',
        }.get(found['limit'], '')
        net.add_row(resource, sparsity, str(len(found['layers'])))
    return [layers, net]


if __name__ == '__main__':
    main()
