"""Kills while a run saves, full disks, damaged and foreign checkpoints, NaN, a rank that dies.

The runs are those of `engine.runs`; whatever happens to one, it ends as the undisturbed one.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from engine.ranks import outcomes_on, train, train_on
from engine.runs import (
    Outcome,
    apart,
    assert_nothing_written,
    assert_same_end,
    smart_config,
    train_here,
)
from mmsmart.engine.checkpoints import READS_SAFELY
from mmsmart.engine.complete_checkpoints import last_complete

KEEP_ONE = dict(default_hooks=dict(checkpoint=dict(max_keep_ckpts=1, save_best='accuracy/top1')))
MOMENTS = [
    'before it is opened',
    'half written',
    'before it has its name',
    'before it is noted',
    'while it is noted',
    'before the old one is deleted',
]


def resumed(config: dict) -> Outcome:
    outcome = train({**config, 'custom_hooks': []}, resume=True)
    assert outcome.error is None and outcome.exitcode == 0, outcome.log
    return outcome


def drafts(work_dir: Path) -> list[Path]:
    return [path for path in work_dir.iterdir() if path.name.endswith('.draft')]


@pytest.mark.parametrize('moment', MOMENTS)
def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path, finished_run, moment):
    """With a single checkpoint kept, and each save of the best one followed by a second save."""
    death = dict(type='DiesWhileSaving', moment=moment, save=4)
    config = smart_config(tmp_path, **KEEP_ONE, custom_hooks=[death])
    assert train(config).exitcode == -9
    whole, _ = last_complete(tmp_path)
    assert torch.load(whole, weights_only=False)['meta']['iter'] >= 6
    resumed(config)
    assert_same_end(finished_run[0], tmp_path)
    assert not drafts(tmp_path)


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_whole(tmp_path, finished_run):
    config = smart_config(tmp_path, custom_hooks=[dict(type='FullDisk', at=15)])
    outcome = train(config)
    assert outcome.error.startswith('OSError') and 'epoch_3.pth' in outcome.error
    assert 'File too large' in outcome.error and '--resume' in outcome.error
    assert not drafts(tmp_path) and not (tmp_path / 'epoch_3.pth').exists()
    assert last_complete(tmp_path) == (tmp_path / 'epoch_2.pth', [])
    resumed(config)
    assert_same_end(finished_run[0], tmp_path)


def test_a_work_dir_that_cannot_be_made_stops_the_run_by_its_name(tmp_path):
    (tmp_path / 'file').touch()
    outcome = apart(train_here, smart_config(tmp_path / 'file/work'), log=tmp_path / 'log.txt')
    assert 'file/work' in outcome.error and 'NotADirectoryError' in outcome.error


@pytest.fixture(scope='module')
def half_way(tmp_path_factory) -> Path:
    """A run that was killed in its search, with the checkpoints of two epochs."""
    folder = tmp_path_factory.mktemp('half_way')
    assert train(smart_config(folder), kill_at=15).exitcode == -9
    return folder


def copy_of(half_way: Path, folder: Path) -> Path:
    shutil.copytree(half_way, folder, dirs_exist_ok=True)
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    """Change one byte in the middle of the largest tensor, which torch would load."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGE = {
    'cut short': cut,
    'one byte': flip,
    'gone': Path.unlink,
    'empty': lambda path: path.write_bytes(b''),
    'text': lambda path: path.write_text('text'),
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, half_way, damage):
    folder = copy_of(half_way, tmp_path)
    damage(folder / 'epoch_2.pth')
    path, (problem,) = last_complete(folder)
    assert path == folder / 'epoch_1.pth' and str(folder / 'epoch_2.pth') in problem


def test_a_run_goes_on_from_the_last_whole_checkpoint(tmp_path, half_way, finished_run):
    folder = copy_of(half_way, tmp_path)
    cut(folder / 'epoch_2.pth')
    (folder / '.epoch_3.pth.draft').write_bytes(b'half')
    outcome = resumed(smart_config(folder))
    assert len(outcome.value) == 18 and 'passed over' in outcome.log
    assert_same_end(finished_run[0], folder)
    assert not drafts(folder)


def test_a_folder_that_was_moved_resumes_from_its_own_checkpoints(tmp_path, half_way):
    folder = copy_of(half_way, tmp_path / 'moved')
    (folder / 'last_checkpoint').write_text('/another/machine/epoch_2.pth')
    assert last_complete(folder)[0] == folder / 'epoch_2.pth'


def test_a_note_that_was_cut_short_does_not_matter(tmp_path, half_way):
    folder = copy_of(half_way, tmp_path)
    (folder / 'last_checkpoint').write_text('')
    assert last_complete(folder) == (folder / 'epoch_2.pth', [])


def test_a_run_without_a_whole_checkpoint_is_refused_rather_than_begun_anew(tmp_path, half_way):
    folder = copy_of(half_way, tmp_path)
    for path in folder.glob('*.pth'):
        cut(path)
    outcome = train(smart_config(folder), resume=True)
    assert outcome.error.startswith('ValueError: resume:')
    assert all(f'epoch_{epoch}.pth: cut short' in outcome.error for epoch in (1, 2))


def test_a_folder_without_checkpoints_begins(tmp_path):
    assert last_complete(tmp_path) is None


class Malice:
    def __reduce__(self):
        return os.mkdir, ('executed',)


FOREIGN = {
    'a pickle that runs code': lambda path: torch.save({'state_dict': {}, 'x': Malice()}, path),
    'an old pickle that runs code': lambda path: path.write_bytes(pickle.dumps(Malice())),
    'an archive of something': lambda path: zipfile.ZipFile(path, 'w').writestr('a', 'b'),
    'text': lambda path: path.write_text('weights'),
    'nothing': lambda path: path.touch(),
    'a tensor': lambda path: torch.save(torch.ones(3), path),
}


@pytest.mark.skipif(not READS_SAFELY, reason='torch 2.5 is the first that can be told what is safe')
@pytest.mark.parametrize('resume', [False, True], ids=['load_from', 'resume'])
def test_foreign_checkpoints_are_refused_and_not_run(tmp_path, resume):
    """All in one process."""
    for name, make in FOREIGN.items():
        make(tmp_path / f'{name}.pth')
    outcome = apart(errors_of, tmp_path, resume, log=tmp_path / 'log.txt')
    assert outcome.error is None, outcome.log
    for name, error in outcome.value.items():
        assert error.startswith(f'ValueError: {tmp_path / name}.pth: '), error
    assert not list(tmp_path.rglob('executed'))
    assert_nothing_written(tmp_path / 'work')


def errors_of(folder: Path, resume: bool) -> dict[str, str]:
    """What training from each of these checkpoints is refused with."""
    os.chdir(folder)
    errors = {}
    for name in FOREIGN:
        config = smart_config(folder / 'work', load_from=str(folder / f'{name}.pth'))
        config.update(experiment_name=name, resume=resume, custom_hooks=[dict(type='Witness')])
        try:
            errors[name] = f'trained for {len(train_here(config))} iterations'
        except Exception as error:
            errors[name] = f'{type(error).__name__}: {error}'
    return errors


def test_nan_in_the_search_stops_it_before_a_step_and_the_run_can_go_on(tmp_path, finished_run):
    config = smart_config(tmp_path, custom_hooks=[dict(type='BrokenImages', at=14)])
    outcome = train(config)
    assert outcome.error.startswith('FloatingPointError: loss: ') and '--resume' in outcome.error
    resumed(config)
    assert_same_end(finished_run[0], tmp_path)


def test_nan_in_the_fine_tuning_writes_no_pruned_checkpoint(tmp_path):
    outcome = train(smart_config(tmp_path, custom_hooks=[dict(type='BrokenImages', at=20)]))
    assert 'FloatingPointError' in outcome.error and 'no pruned.pth' in outcome.error
    assert_nothing_written(tmp_path)


def test_ranks_outlive_no_dead_one_and_go_on_together(tmp_path):
    half = dict(train_dataloader=dict(batch_size=8))
    through, killed = (smart_config(tmp_path / part, **half) for part in ('through', 'killed'))
    train_on(2, through)
    survivor, dead = outcomes_on(2, killed, kills={1: 15})
    assert dead.exitcode == -9
    assert survivor.error is not None, 'it waited for the dead one'
    train_on(2, killed, resume=True)
    assert_same_end(tmp_path / 'through', tmp_path / 'killed')
