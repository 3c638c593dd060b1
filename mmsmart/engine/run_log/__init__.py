"""What a run leaves in its `work_dir`, finished or still going, read into plain data."""

from mmsmart.engine.run_log.folder import read_run
from mmsmart.engine.run_log.starts import note_start

__all__ = ['note_start', 'read_run']
