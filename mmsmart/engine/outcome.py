"""What a run leaves at its end: the pruned network as files, and the report of its masks."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import master_only
from mmengine.runner import Runner

from mmsmart.drawing import draw_report
from mmsmart.engine.runner_models import evaluated_model
from mmsmart.export import save_plain_checkpoint, save_shrunk
from mmsmart.masking import BlockMasks
from mmsmart.plans import ChannelPlan
from mmsmart.report import pruning_report, save_report


@master_only
def write_outcome(
    runner: Runner,
    masks: BlockMasks,
    positions: dict[str, int],
    method: str,
    dense_metrics: dict[str, float],
    pruned_metrics: dict[str, float],
) -> None:
    """Write `pruned.pth`, `pruning.json` and `pruning.png`, of channels `shrunk.pth` as well.

    Args:
        runner: The run; the files go to its `work_dir`.
        masks: Its masks, hard.
        positions: How often one image uses the weights of each layer, by name.
        method: Name of the method.
        dense_metrics: What validation gave before the search.
        pruned_metrics: What it gave at the end.

    Raises:
        FloatingPointError: If a weight is NaN or infinite; nothing is written.
    """
    folder, model = Path(runner.work_dir), evaluated_model(runner)
    broken = [key for key, x in model.state_dict().items() if not bool(x.isfinite().all())]
    if broken:
        raise FloatingPointError(
            f'{broken[0]}: NaN or infinity in the trained weights, so no pruned.pth is written.'
            ' Resume from a checkpoint before the loss became NaN, with a lower learning rate.'
        )
    report = pruning_report(
        model,
        masks,
        positions,
        method=method,
        dense_metrics=dense_metrics,
        pruned_metrics=pruned_metrics,
    )
    meta = {'dataset_meta': getattr(runner.train_dataloader.dataset, 'metainfo', None)}
    save_plain_checkpoint(model, folder / 'pruned.pth', meta)
    is_channels = isinstance(masks.plan, ChannelPlan)
    if is_channels:
        save_shrunk(model, masks, folder, meta)
    save_report(report, folder / 'pruning.json')
    draw_report(report, masks, folder / 'pruning.png')
    shrunk = 'shrunk.pth with its structure.json, ' if is_channels else ''
    runner.logger.info(
        f'mmsmart: {shrunk}pruned.pth, pruning.json and pruning.png are in {folder}.'
    )
