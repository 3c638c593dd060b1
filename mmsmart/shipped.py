"""Where the configs that come with the package lie."""

from pathlib import Path


def configs_folder() -> Path:
    """Folder of the shipped configs: inside an installed package, beside it in a checkout.

    Raises:
        FileNotFoundError: If the package was installed without its configs.

    Example:
        >>> (configs_folder() / '_base_' / 'smart.py').is_file()
        True
    """
    package = Path(__file__).resolve().parent
    for configs in (package / '.mim' / 'configs', package.parent / 'configs'):
        if (configs / '_base_' / 'smart.py').is_file():
            return configs
    raise FileNotFoundError(
        f'_base_/smart.py is not beside {package}: mmsmart was installed without its configs. '
        'Reinstall it with pip.'
    )
