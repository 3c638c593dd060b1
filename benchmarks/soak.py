"""Kill a pruning run again and again, resume it, and compare its end with that of a whole run.

    python benchmarks/soak.py                  # 50 kills of the demo's run, on fewer images
    python benchmarks/soak.py --kills 1000 --minutes 300 --epochs 60

A process is killed with SIGKILL at a random moment, every third one while it writes a checkpoint.
After each kill every checkpoint in the folder has to be whole, and the run has to go on from no
earlier iteration than it could before. A run that comes to its end is compared bit for bit with one
that was never killed, and the next begins, until the kills or the minutes are used up; the last is
let through. Prints counts; exits with 1 on the first loss.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / 'configs/mmpretrain/resnet18_digits_smart.py'
IMAGES = 320  # five iterations an epoch
LONGEST = 3  # epochs that a process lives at most, before it waits for a save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--minutes', type=float, default=30, help='no kill after these')
    parser.add_argument('--epochs', type=int, default=20, help='length of the run')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/soak'))
    parser.add_argument('--seed', type=int, default=0, help='of the moments of the kills')
    arguments = parser.parse_args()
    try:
        soak(arguments)
    except Loss as loss:
        print(f'LOST: {loss}', flush=True)
        return 1
    return 0


class Loss(Exception):
    """A run did not keep what it had."""


def soak(arguments: argparse.Namespace) -> None:
    dice, folder = random.Random(arguments.seed), arguments.work_dir
    warm = process_of(time.sleep, 0)
    warm.join()
    begin = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    whole, killed = folder / 'whole', folder / 'killed'
    run = begun(whole, arguments.epochs)
    run.join()
    if run.exitcode:
        raise Loss(f'the run that nobody killed failed; see {whole}.txt')
    seconds, epochs = time.monotonic() - begin, checked(whole, 0)
    each = seconds / epochs
    print(f'whole run: {epochs} epochs in {seconds:.0f} s', flush=True)

    counts = dict(kills=0, in_saves=0, rounds=0)
    reached = 0  # epochs of the checkpoint that the next start goes on from
    while True:
        over = time.monotonic() - begin > 60 * arguments.minutes
        spared = over or counts['kills'] >= arguments.kills
        run = begun(killed, arguments.epochs)
        if not spared:
            run.join(dice.uniform(0, LONGEST * each))
            if counts['kills'] % 3 == 2:
                wait_for_a_save(run, killed)
            if run.is_alive():
                os.kill(run.pid, signal.SIGKILL)
        run.join()
        if run.exitcode == -signal.SIGKILL:
            counts['kills'] += 1
            counts['in_saves'] += any(killed.glob('.*.draft'))
            reached = checked(killed, reached)
        elif run.exitcode:
            raise Loss(f'it did not go on; see {killed}.txt')
        else:
            expect_same(whole, killed)
            counts['rounds'] += 1
            reached = 0
            shutil.rmtree(killed)
            if spared:
                break
        print(f'{counts}, at epoch {reached}', flush=True)
    print(
        f'{counts["kills"]} kills, {counts["in_saves"]} of them while a checkpoint was written, '
        f'and as many resumes. {counts["rounds"]} runs to the end, each the same as the whole one: '
        f'masks, weights and figures bit for bit. {(time.monotonic() - begin) / 60:.0f} minutes.'
    )


def wait_for_a_save(run: Any, folder: Path) -> None:
    while run.is_alive() and not any(folder.glob('.*.draft')):
        time.sleep(0.001)


def checked(folder: Path, reached: int) -> int:
    """Epochs of the checkpoint that a resume takes; every one of the folder has to be whole."""
    from mmsmart.engine.checkpoints import load_checkpoint
    from mmsmart.engine.complete_checkpoints import expect_undamaged, last_complete

    for path in folder.glob('*.pth'):
        try:
            expect_undamaged(path)
            load_checkpoint(path)
        except ValueError as error:
            raise Loss(str(error)) from error
    found = last_complete(folder) if folder.is_dir() else None
    epochs = load_checkpoint(found[0])['meta']['epoch'] if found else 0
    if epochs < reached:
        raise Loss(f'{folder}: back from epoch {reached} to {epochs}')
    return epochs


def expect_same(one: Path, other: Path) -> None:
    import torch

    first, second = (
        torch.load(folder / 'pruned.pth', weights_only=True)['state_dict']
        for folder in (one, other)
    )
    wrong = [key for key in first if not torch.equal(first[key], second[key])]
    reports = [(folder / 'pruning.json').read_text() for folder in (one, other)]
    if wrong or reports[0] != reports[1]:
        raise Loss(f'another end than that of the whole run: {", ".join(wrong) or "pruning.json"}')


def begun(work_dir: Path, epochs: int) -> Any:
    """Start or resume the run in a process of its own, forked from a warm one."""
    return process_of(train, work_dir, epochs)


def process_of(function: Any, *arguments: Any) -> Any:
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(
        ['mmpretrain.apis', 'mmpretrain.datasets', 'mmpretrain.evaluation', 'mmpretrain.models',
         'mmsmart.engine', 'sklearn.datasets']
    )  # fmt: skip
    process = processes.Process(target=function, args=arguments)
    process.start()
    return process


def train(work_dir: Path, epochs: int) -> None:
    import torch
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    from mmsmart.engine.stock_tools import enable_inheritance

    torch.set_num_threads(1)  # so that sums are of one order, however busy the machine is
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(f'{work_dir}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    enable_inheritance()
    config = Config.fromfile(CONFIG)
    config.merge_from_dict(
        {
            'work_dir': str(work_dir),
            'resume': True,
            'train_cfg.max_epochs': epochs,
            'train_dataloader.dataset.indices': IMAGES,
            # The hardest case: one checkpoint, and a second save after each of the best one.
            'default_hooks.checkpoint': dict(
                interval=1, max_keep_ckpts=1, save_best='accuracy/top1', rule='greater'
            ),
        }
    )
    runner = RUNNERS.build(config)
    runner.train()


if __name__ == '__main__':
    sys.exit(main())
