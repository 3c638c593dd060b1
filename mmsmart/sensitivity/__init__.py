"""How the loss rises with what is pruned, without training: of one layer alone, of the whole net.

What is measured is one-shot pruning by the first importance. Training wins most of the loss back,
so a sparsity that holds here is a lower bound of what a run reaches.
"""

from .drawing import draw_sensitivity
from .probes import Part, fresh_statistics, parts_of, silenced
from .proposal import (
    Grid,
    allowed_rise,
    highest_sparsity,
    lowest_density,
    rules_for,
    rules_from,
    smart_text,
    summary,
)
from .rows import place_of, rows_of

__all__ = [
    'Grid',
    'Part',
    'allowed_rise',
    'draw_sensitivity',
    'fresh_statistics',
    'highest_sparsity',
    'lowest_density',
    'parts_of',
    'place_of',
    'rows_of',
    'rules_for',
    'rules_from',
    'silenced',
    'smart_text',
    'summary',
]
