"""Prune a real model from start to end, without a download: `make demo` and its siblings.

    python tools/demo.py
    python tools/demo.py det --sparsity 0.7 --work-dir work_dirs/yolox
    python tools/demo.py seg --resume

digits   a narrow ResNet-18 on scikit-learn's handwritten digits (`make demo`)
det      a narrow YOLOX-tiny on scenes of these digits on photographs (`make demo-det`)
inst     a narrow Mask R-CNN on such scenes (`make demo-inst`)
seg      a narrow DeepLabV3+ on such scenes (`make demo-seg`)

Each trains a dense model, searches which blocks of 16x8 weights to keep at 80 % sparsity,
fine-tunes what is left, and prints dense and pruned metrics side by side. The files of the run land
in `work_dirs/demo`, `work_dirs/demo-det` and so on.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

_CONFIGS = Path(__file__).parents[1] / 'configs'


class Demo(NamedTuple):
    """One demo: what it prunes, how long that takes, where the files go, and what is pictured."""

    config: str
    pruned: str
    takes: str
    work_dir: str
    metric: str = ''


DEMOS = {
    'digits': Demo(
        'mmpretrain/resnet18_digits_smart.py',
        'a ResNet-18 on handwritten digits',
        'about three minutes',
        'work_dirs/demo',
    ),
    'det': Demo(
        'mmdet/yolox_tiny_scenes_smart.py',
        'YOLOX-tiny on scenes of digits',
        'about four minutes',
        'work_dirs/demo-det',
        'coco/bbox_mAP',
    ),
    'inst': Demo(
        'mmdet/mask-rcnn_r18_fpn_scenes_smart.py',
        'Mask R-CNN on scenes of digits',
        'about three minutes',
        'work_dirs/demo-inst',
        'coco/segm_mAP',
    ),
    'seg': Demo(
        'mmseg/deeplabv3plus_r18_scenes_smart.py',
        'DeepLabV3+ on scenes of digits',
        'about four minutes',
        'work_dirs/demo-seg',
        'mIoU',
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('demo', nargs='?', choices=DEMOS, default='digits', help='which one')
    parser.add_argument('--work-dir', help='where the files go')
    parser.add_argument('--sparsity', type=float, help='share of the weights to remove')
    parser.add_argument(
        '--threads',
        type=int,
        default=1,
        # Measured: on layers this small a second thread gains a quarter of the time on an idle
        # machine, and takes four times as long where something else runs.
        help='CPU threads; more than one is faster only on an idle machine',
    )
    parser.add_argument('--resume', action='store_true', help='go on where a run was interrupted')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    demo = DEMOS[args.demo]
    console = Console()
    console.print(f'Pruning {demo.pruned}: {demo.takes} on a CPU.')
    warnings.filterwarnings(
        'ignore', module=r'(mmengine|mmpretrain|mmdet|mmseg|mmcv|torch|pycocotools)\b'
    )
    import torch
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    from mmsmart.engine.stock_tools import enable_inheritance
    from mmsmart.report import summary_tables

    enable_inheritance()
    torch.set_num_threads(args.threads)
    config = Config.fromfile(_CONFIGS / demo.config)
    config.work_dir = args.work_dir or demo.work_dir
    config.resume = args.resume
    if args.sparsity is not None:
        config.smart.sparsity = args.sparsity

    started = time.monotonic()
    RUNNERS.build(config).train()
    seconds = time.monotonic() - started

    work_dir = Path(config.work_dir)
    report = json.loads((work_dir / 'pruning.json').read_text())
    if demo.metric:
        from mmsmart.engine.predictions import draw_predictions

        files = {'dense': dense_checkpoint(config), 'pruned': work_dir / 'pruned.pth'}
        name = demo.metric.removeprefix('coco/').replace('_', ' ')
        titles = {which: f'{which}\n{name} {report[which][demo.metric]:.2f}' for which in files}
        with console.status('drawing what both see'):
            draw_predictions(
                config,
                {titles[which]: file for which, file in files.items()},
                work_dir / 'predictions.png',
            )
    for table in reversed(summary_tables(report)):
        console.print(table)
    console.print(f'Took {seconds:.0f} s. In {work_dir}/:')
    console.print('  pruned.pth       loads into the stock model, pruned weights are exactly zero')
    console.print('  pruning.json     budget, layers, metrics')
    console.print('  pruning.png      where the network was cut')
    if demo.metric:
        console.print('  predictions.png  what dense and pruned model see in scenes of the test')
    console.print(f'All of it on one page: python tools/report.py {work_dir}', soft_wrap=True)


def dense_checkpoint(config: Any) -> Path:
    """What the run saved at the end of the dense stage; its interval sees to it that there is one.

    The weights in it are the moving average where there is one, as in what is validated.
    """
    from mmsmart.engine.config import Stages

    stages = Stages(**config.smart.stages)
    by_epoch = 'max_epochs' in config.train_cfg
    end, _ = stages.boundaries(config.train_cfg['max_epochs' if by_epoch else 'max_iters'])
    return Path(config.work_dir) / f'{"epoch" if by_epoch else "iter"}_{end}.pth'


if __name__ == '__main__':
    main()
