"""Test a checkpoint: the stock tools/test.py of the config's package, with `mmsmart::` bases.

python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--out FILE] [--tta] [--cfg-options ...]
"""

from mmsmart.engine.stock_tools import run_stock_tool

if __name__ == '__main__':
    run_stock_tool('test.py')
