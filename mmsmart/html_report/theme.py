"""How pictures look: on a light and on a dark ground."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; `runs` tell runs apart, also for those who don't see red and green."""

    name: str
    ground: str
    text: str
    faint: str
    empty: str
    kept: str
    accent: str
    bands: tuple[str, str, str]
    runs: tuple[str, ...]

    @property
    def shades(self) -> LinearSegmentedColormap:
        """From nothing kept to all kept."""
        return LinearSegmentedColormap.from_list('kept', [self.empty, self.kept])

    def applied(self) -> AbstractContextManager[None]:
        """Inside, matplotlib draws with these colours; a figure is also to be saved inside."""
        return matplotlib.rc_context(self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            'figure.facecolor': self.ground,
            'axes.facecolor': self.ground,
            'savefig.facecolor': self.ground,
            'text.color': self.text,
            'axes.labelcolor': self.text,
            'axes.edgecolor': self.faint,
            'axes.linewidth': 0.8,
            'axes.spines.top': False,
            'axes.spines.right': False,
            'axes.titlesize': 10,
            'axes.titleweight': 'bold',
            'axes.titlelocation': 'left',
            'axes.labelsize': 9.5,
            'xtick.color': self.text,
            'ytick.color': self.text,
            'xtick.labelsize': 9,
            'ytick.labelsize': 9,
            'xtick.major.size': 0,
            'ytick.major.size': 0,
            'legend.fontsize': 9,
            'legend.frameon': False,
            'font.size': 9.5,
            'lines.linewidth': 1.8,
            'lines.markersize': 4.5,
        }


LIGHT = Theme(
    'light', '#ffffff', '#1f2937', '#cbd2dc', '#e9edf3', '#1d4ed8', '#c2410c',
    ('#eef2f7', '#fdf3e3', '#e9f6ef'),
    ('#1d4ed8', '#c2410c', '#0f766e', '#a21caf', '#a16207', '#475569'),
)  # fmt: skip
DARK = Theme(
    'dark', '#171c26', '#dfe5ee', '#465063', '#2a3242', '#7fb0ff', '#ff9f5a',
    ('#1d2431', '#2c2519', '#182a25'),
    ('#7fb0ff', '#ff9f5a', '#4fd1b5', '#ec8bf5', '#e7c65a', '#a3b1c6'),
)  # fmt: skip
