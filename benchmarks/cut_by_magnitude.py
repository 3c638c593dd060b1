"""Cut a model without training it, for measurements of speed and size: weights do not matter there.

    python benchmarks/cut_by_magnitude.py CONFIG work_dirs/cut --sparsity 0.5 --round-to 8
    python tools/benchmark.py CONFIG work_dirs/cut/pruned.pth work_dirs/cut/shrunk.pth --onnx

Writes `pruned.pth`, `shrunk.pth` and `structure.json`, with the channels of largest mean weight
kept under a budget of MACs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.model import revert_sync_batchnorm

from mmsmart import masks_of
from mmsmart.engine.export import load_model, read_config
from mmsmart.engine.model import SmartModel
from mmsmart.engine.raw_forward import example_input
from mmsmart.export import save_plain_checkpoint, save_shrunk
from mmsmart.importance import magnitude


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('folder', type=Path)
    parser.add_argument('--sparsity', type=float, default=0.5, help='share of the MACs to remove')
    parser.add_argument('--round-to', type=int, default=1)
    parser.add_argument('--shape', type=int, nargs='+', help='height and width of an image')
    args = parser.parse_args()
    config = read_config(args.config)
    if 'frozen_stages' in config.model.backbone:
        config.model.backbone.frozen_stages = -1  # nothing is trained that freezing could protect
    shape = example_input(config, args.shape).shape[-2:]
    model = SmartModel(
        revert_sync_batchnorm(load_model(config)),
        block='channel',
        resource='macs',
        shape=shape,
        sparsity=args.sparsity,
        round_to=args.round_to,
    )
    masks = masks_of(model)
    masks.begin(masks.plan.first(magnitude(masks.layers)), temperature=1.0)
    masks.harden()
    args.folder.mkdir(parents=True, exist_ok=True)
    save_plain_checkpoint(model, args.folder / 'pruned.pth')
    save_shrunk(model, masks, args.folder)
    kept, total = masks.kept_cost(), masks.total_cost
    print(f'{kept / total:.2%} of {total:,.0f} MACs kept, {len(masks.excluded)} layers left whole')


if __name__ == '__main__':
    main()
