"""Write a pruned model as a file that others can run.

    python tools/export.py CONFIG work_dirs/my_run/pruned.pth --to onnx
    python tools/export.py CONFIG work_dirs/my_run/epoch_60.pth --to checkpoint --out plain.pth

What `--to` can be:

    checkpoint  weights alone, dense shapes, pruned weights exactly zero: for the stock tools
    blocks      packed blocks, only those that are left (docs/packed-blocks.md)
    shrunk      channels that were pruned cut out, with structure.json and a config for it
    onnx        backbone, neck and head as ONNX, compared with the model by ONNX Runtime
    pt2         the same as a graph of torch.export, compared with the model

Of a two-stage detector the ONNX and pt2 files end where its RoI head begins.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

ENDINGS = {
    'checkpoint': '_plain.pth',
    'blocks': '_blocks.safetensors',
    'shrunk': '_shrunk.pth',
    'onnx': '.onnx',
    'pt2': '.pt2',
}


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='config that the model was trained with')
    add('checkpoint', help='pruned.pth, shrunk.pth, or one saved since the search ended')
    add('--to', required=True, choices=list(ENDINGS), help='what to write')
    add('--out', metavar='FILE', help='file to write; beside the checkpoint if not given')
    add('--shape', type=int, nargs='+', metavar='N',
        help='height and width of an image for onnx and pt2 (one number: a square); by default '
        'what the test pipeline of the config makes')  # fmt: skip
    add('--dynamic-batch', action='store_true', help='onnx takes any number of images at once')
    add('--report', metavar='FILE',
        help='pruning.json for blocks; the one beside the checkpoint if not given')  # fmt: skip
    add('--structure', metavar='FILE',
        help='structure.json for shrunk; the one beside the checkpoint if not given')  # fmt: skip
    add('--cfg-options', nargs='+', action=DictAction,
        help='override settings of the config, the key-value pair in xxx=yyy format')  # fmt: skip
    return parser.parse_args(args)


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore', module=r'(mmengine|mmpretrain|mmdet|mmseg|mmcv|torch)\b')
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from mmsmart.engine import export

    out = Path(args.out or Path(args.checkpoint).with_suffix(''))
    if not args.out:
        out = out.with_name(out.name + ENDINGS[args.to])
    try:
        config = export.read_config(args.config, args.cfg_options)
        given = (config, args.checkpoint, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as progress:
            progress.add_task(f'writing {out.name}', total=None)
            difference = {
                'checkpoint': lambda: export.export_checkpoint(*given),
                'blocks': lambda: export.export_blocks(*given, args.report),
                'shrunk': lambda: export.export_shrunk(*given, args.structure, args.shape),
                'onnx': lambda: export.export_onnx(*given, args.shape, args.dynamic_batch),
                'pt2': lambda: export.export_pt2(*given, args.shape),
            }[args.to]()
    except (ValueError, FileNotFoundError, ImportError, ArithmeticError) as error:
        raise SystemExit(f'tools/export.py: {error}') from error
    print(f'{out} ({out.stat().st_size / 1e6:.2f} MB)')
    if difference is not None:
        print(f"differs from the model by at most {difference:.1e} of an output's largest value")


if __name__ == '__main__':
    main()
