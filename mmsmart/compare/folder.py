"""The folder of a run: what is there of it, and whether it belongs to the suite as it is now."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from mmsmart.compare.grid import Job, config_text
from mmsmart.export import complete_or_absent

DONE, BEGUN, FAILED, CHANGED, NEW = 'done', 'begun', 'failed', 'changed', 'new'


class JobFolder:
    """Where a run writes: `seed0/` with MMEngine's files and `job.json`, and `seed0.py` beside it.

    The config lies outside because MMEngine writes its own copy of it under the same name inside.
    """

    def __init__(self, root: str | Path, job: Job) -> None:
        self.root = Path(root)
        self.job = job
        self.path = self.root / job.name
        self.config = self.path.with_name(f'{self.path.name}.py')
        self.log = self.path / 'train.log'
        self._seconds: float | None = 0.0

    def record(self) -> dict[str, Any]:
        """What `job.json` says; nothing if it is not there, or no JSON."""
        return _record(self.path)

    def state(self) -> str:
        """'done', 'begun' (and stopped), 'failed', 'changed' (of other settings) or 'new'."""
        record = self.record()
        if not record:
            return NEW
        if record.get('settings') != self.job.settings:
            return CHANGED
        if record.get('state') == FAILED:
            return FAILED
        if self.job.method is None:
            is_done = record.get('state') == DONE and self.last_checkpoint() is not None
        else:
            is_done = (self.path / 'pruning.json').is_file()
        return DONE if is_done else BEGUN

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of the run, by the name that MMEngine noted."""
        try:
            noted = (self.path / 'last_checkpoint').read_text().strip()
        except OSError:
            return None
        checkpoint = self.path / Path(noted).name
        return checkpoint if noted and checkpoint.is_file() else None

    def weights(self) -> str | None:
        """The checkpoint that the run starts from; None if its config sees to that.

        Raises:
            FileNotFoundError: If it is not there.
        """
        if self.job.dense is not None:
            trained = JobFolder(self.root, self.job.dense).last_checkpoint()
            if trained is None:
                raise FileNotFoundError(f'{self.job.dense.name}: there is no checkpoint.')
            return str(trained.resolve())
        if self.job.checkpoint is None:
            return None
        given = Path(self.job.checkpoint).expanduser()
        if not given.is_file():
            raise FileNotFoundError(
                f'tasks.{self.job.task}.checkpoint: {self.job.checkpoint} is not there. Put it '
                'there, or name in the suite where it is.'
            )
        return str(given.resolve())

    def drop_checkpoints(self) -> None:
        """Delete what a finished run could have been resumed from; `pruned.pth` stays."""
        for path in self.path.glob('*.pth'):
            if re.fullmatch(r'(epoch|iter)_\d+\.pth', path.name):
                path.unlink()
        (self.path / 'last_checkpoint').unlink(missing_ok=True)

    def lock(self) -> IO[str] | None:
        """Hold the folder until the returned file is closed; None if another process holds it.

        A run inherits the file, so a folder stays held while anything still writes to it.

        Raises:
            ValueError: If nothing can be held on its file system.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = (self.path.parent / f'.{self.path.name}.lock').open('a')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise ValueError(
                f'work-dir: {self.root} is on a file system without locks ({error.strerror}), and '
                'without them two processes could write to one run. Take a --work-dir on another '
                'one, such as a local disk.'
            ) from error
        return file

    def prepare(self) -> bool:
        """Write the config and the record of a run that begins now; whether it goes on with one.

        What lies there of another run is renamed to `seed0.replaced`. Of these one is kept, a
        finished one rather than one that is not; without a checkpoint there is nothing to keep.

        Raises:
            FileNotFoundError: If the weights that it starts from are not there.
        """
        load_from = self.weights()
        goes_on = self.state() == BEGUN and self.last_checkpoint() is not None
        if goes_on:
            # Of a run that was killed nobody knows how long it took.
            self._seconds = self.record().get('seconds')
        elif self.path.exists():
            old = self.path.with_name(f'{self.path.name}.replaced')
            if _worth(self.path) > 0 and _worth(self.path) >= _worth(old):
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.path, old)
            else:
                shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(self.config) as temporary:
            temporary.write_text(config_text(self.job, self.config, load_from))
        self.note(state=BEGUN, name=self.job.name, settings=self.job.settings, seconds=None)
        return goes_on

    def note(self, **entries: Any) -> dict[str, Any]:
        """Write entries of `job.json`; the others stay."""
        record = {**self.record(), **entries}
        with complete_or_absent(self.path / 'job.json') as temporary:
            temporary.write_text(json.dumps(record, indent=2) + '\n')
        return record

    def note_end(self, state: str, seconds: float, **entries: Any) -> dict[str, Any]:
        """:meth:`note` that a run ended, after so many seconds more."""
        total = None if self._seconds is None else round(self._seconds + seconds, 1)
        ended = datetime.now(timezone.utc).isoformat()  # no two ends have the same record
        return self.note(state=state, seconds=total, ended=ended, **entries)

    def last_lines(self, count: int = 20) -> list[str]:
        """Of what the run printed."""
        if not self.log.is_file():
            return []
        with self.log.open('rb') as file:
            file.seek(max(self.log.stat().st_size - 20_000, 0))
            text = file.read().decode(errors='replace')
        return [line for line in text.splitlines() if line.strip()][-count:]


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / 'job.json').read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _worth(folder: Path) -> int:
    """2 for what a finished run wrote, 1 for checkpoints, 0 for less."""
    if (folder / 'pruning.json').is_file() or _record(folder).get('state') == DONE:
        return 2
    return int(any(folder.glob('*.pth')))
