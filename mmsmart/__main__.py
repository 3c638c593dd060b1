"""`python -m mmsmart` says which version this is, where its base file lies, and what is missing.

Its exit status is 0 if the models of at least one toolbox can be pruned, else 1.
"""

import sys

from mmsmart import __version__
from mmsmart.health import look_around, report
from mmsmart.shipped import configs_folder

if __name__ == '__main__':
    print(f'mmsmart {__version__}')
    print(f'base file: {configs_folder() / "_base_" / "smart.py"}', flush=True)
    stack = look_around()
    print('', *report(stack), sep='\n')
    sys.exit(0 if stack.prunable else 1)
