"""The packed-blocks file: of every pruned weight only the blocks that are left, in safetensors.

A block-sparse format (BSR with one flat index, any number of axes and ragged edges), laid out so
that a compiler can read it without this package: docs/packed-blocks.md. One file is a whole model.
"""

from .file import FORMAT, load_packed, load_packed_meta, save_packed, save_packed_model

__all__ = ['FORMAT', 'load_packed', 'load_packed_meta', 'save_packed', 'save_packed_model']
