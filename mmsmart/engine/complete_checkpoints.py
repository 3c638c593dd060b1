"""Checkpoints of a run are complete or not there, and `--resume` takes no other.

MMEngine writes a checkpoint in place, deletes the one that it replaces before that, and falls back
on pickle for what torch refuses to read without. A process that is killed, or a disk that is full,
can so leave half a checkpoint under the name that `--resume` goes by, or none at all.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmsmart.engine.checkpoints import READS_SAFELY, load_checkpoint, mmengine_types
from mmsmart.registry import HOOKS

_DRAFT = '.{}.draft'  # name of a checkpoint while it is written
_OURS = ('epoch_*.pth', 'iter_*.pth')


class CompleteCheckpoints:
    """A runner's part that writes and reads checkpoints; comes before `Runner` among the bases."""

    @dist.master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """As MMEngine's; on a local disk the file is complete, or what it was before.

        Raises:
            OSError: If it can't be written, with the file's name.
        """
        backend = get_file_backend(out_dir, backend_args=kwargs.get('backend_args'))
        if not isinstance(backend, LocalBackend):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        final, draft = Path(out_dir, filename), Path(out_dir, _DRAFT.format(filename))
        try:
            super().save_checkpoint(out_dir, draft.name, *args, **kwargs)
            with draft.open('rb') as file:
                os.fsync(file.fileno())  # the name must not reach the disk before the bytes do
            draft.replace(final)
        except OSError as error:
            raise OSError(
                error.errno,
                f'this checkpoint could not be written ({error.strerror or error}); earlier ones '
                'are whole. Make room, or name another `work_dir`, and go on with --resume',
                str(final),
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As MMEngine's; a local file that only pickle could read is refused.

        With a torch older than 2.5, which can't be told MMEngine's types, it is MMEngine's alone.

        Raises:
            ValueError: With the file's name and what is wrong with it.
        """
        if READS_SAFELY and os.path.isfile(os.path.expanduser(filename)):
            load_checkpoint(os.path.expanduser(filename))  # tensors are not read yet
        with mmengine_types():
            return super().load_checkpoint(filename, *args, **kwargs)

    def load_or_resume(self) -> None:
        """As MMEngine's; `--resume` takes the last complete checkpoint.

        Raises:
            ValueError: If there are checkpoints, but not one is complete.
        """
        if self._resume and self._load_from is None and not self._has_loaded:
            found: list[Any] = [None]
            if dist.is_main_process():
                for draft in Path(self.work_dir).glob(_DRAFT.format('*')):
                    draft.unlink()  # of a process that was killed
                try:
                    found = [last_complete(self.work_dir)]
                except ValueError as error:
                    found = [error]
            dist.broadcast_object_list(found)
            if isinstance(found[0], ValueError):
                raise found[0]
            if found[0] is not None:
                path, damage = found[0]
                for problem in damage:
                    self.logger.warning(f'mmsmart: resume: passed over {problem}')
                self._load_from = str(path)
        super().load_or_resume()


@HOOKS.register_module()
class SmartCheckpointHook(CheckpointHook):
    """`CheckpointHook` that deletes an outdated file when its successor is complete, not before."""

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.file_backend = _DeletingLater()

    def after_train_epoch(self, runner: Runner) -> None:
        super().after_train_epoch(runner)
        self._delete_outdated()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        super().after_train_iter(runner, *args, **kwargs)
        self._delete_outdated()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        super().after_val_epoch(runner, metrics)
        self._delete_outdated()

    def _delete_outdated(self) -> None:
        # MMEngine gives itself a backend in `before_train`, which a validation alone does not see.
        backend = getattr(self, 'file_backend', None)
        if isinstance(backend, _DeletingLater):
            backend.delete()


class _DeletingLater(LocalBackend):
    """Notes what is to be removed, and removes it when told to."""

    def __init__(self) -> None:
        super().__init__()
        self._outdated: dict[Path, int] = {}

    def remove(self, filepath: str | Path) -> None:
        self._outdated[Path(filepath)] = os.stat(filepath).st_ino

    def delete(self) -> None:
        for path, number in self._outdated.items():
            # A successor of the same name has taken its place.
            if path.is_file() and path.stat().st_ino == number:
                path.unlink()
        self._outdated.clear()


def last_complete(folder: str | Path) -> tuple[Path, list[str]] | None:
    """The checkpoint to resume from, and what is wrong with those that were passed over.

    It is the one that `last_checkpoint` names; if that is gone or damaged, the newest of the folder
    that is whole. None if there never was one.

    Raises:
        ValueError: If there are some, but not one is whole.
    """
    note = Path(folder, 'last_checkpoint')
    named = note.read_text(errors='replace').strip().strip('\0') if note.is_file() else ''
    written = [path for pattern in _OURS for path in Path(folder).glob(pattern)]
    written.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    damage = []
    for path in dict.fromkeys([*([Path(named)] if named else []), *written]):
        try:
            if not path.is_file():
                raise ValueError(f'{path}: `last_checkpoint` names it, but it is not there.')
            expect_undamaged(path)
            if READS_SAFELY:
                load_checkpoint(path)
        except (OSError, ValueError) as error:
            damage.append(str(error))
        else:
            return path, damage
    if damage:
        raise ValueError(
            f'resume: {folder} has no checkpoint to go on from. {" ".join(damage)} Start anew '
            'without --resume, or name a checkpoint with it.'
        )
    return None


def expect_undamaged(path: str | Path) -> None:
    """Compare every entry of a checkpoint with its checksum.

    Raises:
        ValueError: If the file is cut short or changed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise ValueError(f'{path}: cut short, or no checkpoint ({error}).') from error
    if wrong is not None:
        raise ValueError(f'{path}: damaged at {wrong}: its checksum is another.')
