"""`python -m mmsmart` says which version this is and where its base file lies."""

from pathlib import Path

from mmsmart import __version__


def base_file() -> Path:
    """Path of `_base_/smart.py`, installed or in a checkout.

    Raises:
        FileNotFoundError: If the package was installed without its configs.
    """
    package = Path(__file__).resolve().parent
    for configs in (package / '.mim' / 'configs', package.parent / 'configs'):
        if (configs / '_base_' / 'smart.py').is_file():
            return configs / '_base_' / 'smart.py'
    raise FileNotFoundError(
        f'_base_/smart.py is not beside {package}: mmsmart was installed without its configs. '
        'Reinstall it with pip.'
    )


if __name__ == '__main__':
    print(f'mmsmart {__version__}')
    print(f'base file: {base_file()}')
