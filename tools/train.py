"""Train or prune: the stock tools/train.py of the config's package, with `mmsmart::` bases.

python tools/train.py CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--amp] [--cfg-options ...]
"""

from mmsmart.engine.stock_tools import run_stock_tool

if __name__ == '__main__':
    run_stock_tool('train.py')
