"""`python -m mmsmart` says which version this is and where its base file lies."""

from mmsmart import __version__
from mmsmart.shipped import configs_folder

if __name__ == '__main__':
    print(f'mmsmart {__version__}')
    print(f'base file: {configs_folder() / "_base_" / "smart.py"}')
