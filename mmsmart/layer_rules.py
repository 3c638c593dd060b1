"""How a config writes blocks, and rules for layers by name.

Every value is checked here, before a model is looked at; what it means for the weight of a layer is
in :mod:`mmsmart.blocks`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHAPE = re.compile(r'(?:\*|[1-9][0-9]*)(?:x(?:\*|[1-9][0-9]*)){1,4}')
_N_OF_M = re.compile(r'([0-9]+):([0-9]+)')


_TOLD = {str: "a name or pattern such as 'backbone.*'", bool: 'True or False'}


@dataclass(frozen=True)
class NOfM:
    """At most `n` of every `m` weights that stand side by side along the input axis are kept."""

    n: int
    m: int


Block = tuple[int, ...] | NOfM


def read_block(key: str, block: Sequence[int] | str) -> Block:
    """A block as it is written in a config: its shape, or N of M.

    Args:
        key: Config key, for messages.
        block: `(out, in, kh, kw)`, of which a pair has whole kernels; or a string: '16x8' is
            (16, 8, 1, 1), '16x8x*x*' is (16, 8, -1, -1), whole kernels; '2:4' keeps at most 2 of
            every 4 single weights along the input axis.

    Raises:
        ValueError: For anything else.

    Example:
        >>> read_block('block', '1x16'), read_block('block', '2:4')
        ((1, 16, 1, 1), NOfM(n=2, m=4))
    """
    if isinstance(block, str):
        shape, pattern = _SHAPE.fullmatch(block), _N_OF_M.fullmatch(block)
        if pattern and 0 < int(pattern[1]) < int(pattern[2]):
            return NOfM(int(pattern[1]), int(pattern[2]))
        if not shape:
            raise ValueError(
                f"{key}: got {block!r}, allowed are (out, in, kh, kw), 'OUTxIN' such as '16x8', "
                "'OUTxINxKHxKW' with * for a whole axis, 'N:M' with N below M such as '2:4', and "
                "'channel' for the whole network."
            )
        entries = [-1 if entry == '*' else int(entry) for entry in block.split('x')]
        block = (*entries, 1, 1) if len(entries) == 2 else tuple(entries)
    if not isinstance(block, Sequence) or len(block) < 2:
        raise ValueError(
            f'{key}: expected (out, in, kh, kw), for example (16, 8, 1, 1), got {block!r}.'
        )
    for entry in block:
        if isinstance(entry, bool) or not isinstance(entry, int) or (entry < 1 and entry != -1):
            raise ValueError(
                f'{key}: every entry of {tuple(block)} must be an integer of at least 1, or -1 for '
                f'the whole axis; got {entry!r}.'
            )
    return tuple(block)


def default_sparsity(block: Sequence[int] | str, key: str = 'block') -> float:
    """What is removed where no sparsity is asked for: what N of M removes, else one half.

    Example:
        >>> default_sparsity('1:4'), default_sparsity((16, 8, 1, 1)), default_sparsity('channel')
        (0.75, 0.5, 0.5)
    """
    read = None if block == 'channel' else read_block(key, block)
    return 1 - read.n / read.m if isinstance(read, NOfM) else 0.5


def checked_rule(index: int, rule: dict[str, Any]) -> dict[str, Any]:
    """The rule, once its keys and values are known to be right."""
    allowed = {'pattern', 'block', 'min_density', 'exclude'}
    if not isinstance(rule, dict):
        raise ValueError(f'layers[{index}]: expected a dict with keys of {allowed}, got {rule!r}.')
    unknown = set(rule) - allowed
    if unknown or 'pattern' not in rule or len(rule) < 2:
        raise ValueError(
            f'layers[{index}]: expected `pattern` and at least one of `block`, `min_density` and '
            f'`exclude`, got the keys {sorted(rule)}.'
        )
    for key, kind in (('pattern', str), ('exclude', bool)):
        if not isinstance(rule.get(key, kind()), kind):
            raise ValueError(f'layers[{index}].{key}: expected {_TOLD[kind]}, got {rule[key]!r}.')
    if 'block' in rule:
        rule = {**rule, 'block': read_block(f'layers[{index}].block', rule['block'])}
    density = rule.get('min_density', 0)
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 <= density <= 1:
        raise ValueError(
            f'layers[{index}].min_density: expected a share of the weights in [0, 1], got '
            f'{density!r}. 0 allows a layer to be cut off whole.'
        )
    return rule


def checked_rules(rules: Sequence[dict[str, Any]], coupled: bool = False) -> list[dict[str, Any]]:
    """:func:`checked_rule` of all; with `coupled` channels none of them may name a block."""
    if not isinstance(rules, (list, tuple)):
        raise ValueError(f'layers: expected a list of rules, each a dict, got {rules!r}.')
    checked = [checked_rule(index, rule) for index, rule in enumerate(rules)]
    for index, rule in enumerate(checked):
        if coupled and 'block' in rule:
            raise ValueError(
                f"layers[{index}].block: can't be set beside block='channel', which cuts coupled "
                'channels. Leave it out, or exclude the layer.'
            )
    return checked


def least_densities(
    names: Sequence[str], overrides: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """`min_density` of each layer by the rules of `layers`; None where no rule says one."""
    densities: dict[str, float | None] = dict.fromkeys(names)
    for rule in checked_rules(overrides):
        if 'min_density' in rule:
            found = [name for name in names if matches(rule['pattern'], name)]
            densities.update(dict.fromkeys(found, rule['min_density']))
    return densities


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern means the layer of this name."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f'{pattern}.')
