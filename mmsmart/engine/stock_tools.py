"""Our train and test tools are those of the config's own package, with `mmsmart::` bases."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.config import utils as config_utils

_SCOPES = ('mmpretrain', 'mmdet', 'mmseg')


def enable_inheritance() -> None:
    """Let configs inherit `mmsmart::path` as they do `mmdet::path`.

    MMEngine knows the packages that may be inherited from by a table of its own.
    """
    config_utils.MODULE2PACKAGE.setdefault('mmsmart', 'mmsmart')


def run_stock_tool(name: str) -> None:
    """Run `tools/<name>` of the package whose models the config on the command line holds.

    All arguments are those of the stock tool. Without a config, mmpretrain's help is shown.

    Raises:
        SystemExit: If the config has no known `default_scope`, or its package is not installed.
    """
    enable_inheritance()
    configs = [arg for arg in sys.argv[1:] if arg.endswith('.py') and Path(arg).is_file()]
    scope = Config.fromfile(configs[0]).get('default_scope') if configs else _SCOPES[0]
    if scope not in _SCOPES:
        raise SystemExit(
            f'{configs[0]}: default_scope is {scope!r}, so tools/{name} does not know whose models '
            f'it holds. Allowed are {", ".join(_SCOPES)}.'
        )
    spec = importlib.util.find_spec(scope)
    if spec is None:
        raise SystemExit(
            f'tools/{name} needs {scope}, which is not installed. Install it as its own guide '
            'says, or `pip install mmsmart[onedl]` in an environment that has no OpenMMLab package '
            'yet.'
        )
    tool = Path(spec.origin).parent / '.mim' / 'tools' / name
    if not tool.is_file():
        raise SystemExit(f'{tool} is missing: {scope} was installed without its tools.')
    runpy.run_path(str(tool), run_name='__main__')
