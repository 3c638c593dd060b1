"""Our train and test tools are those of the config's own package, with `mmsmart::` bases."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

from mmengine.config import Config

from mmsmart.shipped import configs_folder

_SCOPES = ('mmpretrain', 'mmdet', 'mmseg', 'mmyolo')
_mmengine_cfg_path = Config._get_cfg_path


class MissingToolbox(ModuleNotFoundError):
    """A config needs a toolbox that is not installed; the message says how to install it."""

    def __init__(self, file: str, scope: str) -> None:
        super().__init__(
            f'{file} needs {scope}, which is not installed. '
            + (
                'Its last release, 0.6.0, wants mmcv older than 2.1 and refuses any newer one, so '
                'give it an environment of its own: `pip install openmim`, then `mim install '
                '"mmcv>=2.0.0rc4,<2.1.0" "mmdet>=3.0.0,<4.0.0" mmyolo` and `pip install -e .` in '
                'the checkout of mmsmart.'
                if scope == 'mmyolo'
                else 'Install it as its own guide says, or, in an environment without any '
                "OpenMMLab package, `pip install -e '.[onedl]'` in the checkout of mmsmart."
            ),
            name=scope,
        )


def enable_inheritance() -> None:
    """Let configs inherit `mmsmart::path`, and `mmseg::path` from either family.

    MMEngine finds the folder of `package::` by the name of a distribution, from a table of its own.
    It has no entry for mmsmart, and that of mmseg names a distribution which the maintained fork
    does not have. A base of a toolbox that is not installed raises :class:`MissingToolbox`.
    """
    Config._get_cfg_path = staticmethod(_cfg_path)


def _cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
    """Path of a base file, and the registry scope of what it defines."""
    scope, inherits, name = cfg_path.partition('::')
    if inherits and scope == 'mmsmart':
        # Without a scope, as if given by path: our configs hold models of other packages.
        return str(configs_folder() / name), None
    try:
        return _mmengine_cfg_path(cfg_path, filename)
    except Exception as error:  # which one depends on the family and on how it was installed
        if not inherits or scope not in _SCOPES:
            raise
        spec = importlib.util.find_spec(scope)
        if spec is None:
            raise MissingToolbox(filename, scope) from error
        return str(Path(spec.origin).parent / '.mim' / 'configs' / name), scope


def run_stock_tool(name: str) -> None:
    """Run `tools/<name>` of the package whose models the config on the command line holds.

    All arguments are those of the stock tool. Without a config, mmpretrain's help is shown.

    Raises:
        SystemExit: If the config has no known `default_scope`, or its package is not installed.
    """
    enable_inheritance()
    configs = [arg for arg in sys.argv[1:] if arg.endswith('.py') and Path(arg).is_file()]
    try:
        scope = Config.fromfile(configs[0]).get('default_scope') if configs else _SCOPES[0]
    except MissingToolbox as error:
        raise SystemExit(str(error)) from error
    if scope not in _SCOPES:
        raise SystemExit(
            f'{configs[0]}: default_scope is {"missing" if scope is None else repr(scope)}, so '
            f'tools/{name} does not know whose models it holds. Write default_scope = one of '
            f'{", ".join(_SCOPES)}.'
        )
    spec = importlib.util.find_spec(scope)
    if spec is None:
        raise SystemExit(str(MissingToolbox(f'tools/{name}', scope)))
    tool = Path(spec.origin).parent / '.mim' / 'tools' / name
    if not tool.is_file():
        raise SystemExit(f'{tool} is missing: {scope} was installed without its tools.')
    runpy.run_path(str(tool), run_name='__main__')
