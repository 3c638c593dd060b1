"""How the temperature falls over the structural search.

At a fixed temperature gradient descent can stop at a point that is not sparse; a falling one moves
the mask and with it the gradient (SMART pruner, arXiv 2403.19969, Theorem 3.7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = ('geometric', 'linear', 'cosine')


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature as a function of progress in [0, 1], whatever the length of the run.

    It never rises, equals ``start`` at progress 0 and ``end`` at progress 1. Equal start and end
    give a fixed temperature.

    Shapes:
        - ``'geometric'``: log τ falls on a straight line, the same factor every step.
        - ``'linear'``: τ falls on a straight line; nearly all of log τ is left to the end.
        - ``'cosine'``: log τ falls along half a cosine: slowly, then fast, then slowly.

    Args:
        start: τ at progress 0, > 0 and finite.
        end: τ at progress 1, in (0, start].
        shape: one of the shapes above.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> schedule = TemperatureSchedule(4.0, 0.01, 'geometric')
        >>> schedule(0.0), round(schedule(0.5), 6), schedule(1.0)
        (4.0, 0.2, 0.01)
    """

    start: float
    end: float
    shape: str = 'geometric'

    def __post_init__(self) -> None:
        if not 0 < self.start < math.inf:
            raise ValueError(f'start is {self.start}; a temperature must be > 0 and finite')
        if not self.end > 0:
            raise ValueError(
                f'end is {self.end}; a temperature must be > 0. '
                f'For an almost hard mask use a small one, such as 0.01'
            )
        if self.end > self.start:
            raise ValueError(
                f'the temperature must not rise: start is {self.start}, end is {self.end}. '
                f'Swap them, or set them equal for a fixed temperature'
            )
        if self.shape not in SHAPES:
            raise ValueError(f'shape is {self.shape!r}; it must be one of {", ".join(SHAPES)}')

    def __call__(self, progress: float) -> float:
        """Return τ at this progress.

        Raises:
            ValueError: progress is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(
                f'progress is {progress}; it must lie in [0, 1], '
                f'the iterations done of the search over all of its iterations'
            )
        # The ends are given back as they were written, not as log and exp round them.
        if progress == 0:
            return self.start
        if progress == 1:
            return self.end
        if self.shape == 'linear':
            value = self.start + (self.end - self.start) * progress
        else:
            fallen = progress
            if self.shape == 'cosine':
                fallen = 0.5 * (1 - math.cos(math.pi * progress))
            value = self.start * (self.end / self.start) ** fallen
        return min(max(value, self.end), self.start)


def temperature_at(progress: float, start: float, end: float, shape: str = 'geometric') -> float:
    """Return the temperature of one moment; see `TemperatureSchedule` for arguments and errors.

    Example:
        >>> round(temperature_at(0.25, start=1.0, end=0.0001), 6)
        0.1
    """
    return TemperatureSchedule(start, end, shape)(progress)
