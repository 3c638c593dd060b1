"""From losses that were measured to a sparsity to ask for, and to the layers to spare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmsmart.budget import RESOURCES

# What protected layers may keep of the resource, so that the others still have some to lose.
_PROTECTED = 0.2


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Args:
        densities: Shares of a layer that stay, each in (0, 1).
        sparsities: Shares of the whole net that leave, each in (0, 1).
        resources: What the sparsities count.

    Raises:
        ValueError: For a value out of range.
    """

    densities: Sequence[float] = (0.75, 0.5, 0.25, 0.1, 0.05)
    sparsities: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    resources: Sequence[str] = ('params', 'macs')

    def __post_init__(self) -> None:
        for key, values in (('densities', self.densities), ('sparsities', self.sparsities)):
            if not values or not all(0 < value < 1 for value in values):
                raise ValueError(f'{key}: expected numbers between 0 and 1, got {list(values)}.')
        unknown = [name for name in self.resources if name not in RESOURCES]
        if unknown or not self.resources:
            raise ValueError(f'resources: got {unknown}, allowed are {list(RESOURCES)}.')

    def size(self, parts: int) -> int:
        """Number of probes at most, the dense one included, of a net with so many layers."""
        return 1 + parts * len(self.densities) + 2 * len(self.resources) * len(self.sparsities)


def allowed_rise(allow: str | float, loss: float) -> float:
    """What the loss may rise by: `'10%'` is a share of the dense loss, `0.1` the rise itself.

    Raises:
        ValueError: If it is no number above 0, with or without a percent sign, or a share of a loss
            that is not above 0.

    Example:
        >>> allowed_rise('10%', loss=2.0), allowed_rise('0.1', loss=2.0)
        (0.2, 0.1)
    """
    text = str(allow).strip()
    try:
        number = float(text.removesuffix('%'))
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(
            f'allow: expected a rise of the loss above 0, such as 0.1, or a share of the dense '
            f"loss, such as '10%'; got {allow!r}."
        )
    if not text.endswith('%'):
        return number
    if loss <= 0:
        raise ValueError(
            f'allow: {allow!r} is a share of the dense loss, which is {loss:g}. Give the rise '
            'itself, such as 0.1.'
        )
    return number / 100 * loss


def highest_sparsity(curve: Sequence[tuple[float, float | None]], allowed: float) -> float:
    """The sparsity up to which the rise stays within what is allowed, between measured points.

    Linear between the last point that holds and the first that does not; a curve that comes down
    again later is not trusted. Never beyond the last point that was measured.

    Args:
        curve: Sparsity and rise of the loss, by rising sparsity; the first is what holds for sure.
            A rise of None is a loss that is not finite.
        allowed: Largest rise.

    Example:
        >>> highest_sparsity([(0.0, 0.0), (0.5, 0.1), (0.7, 0.5), (0.9, 2.0)], allowed=0.2)
        0.55
    """
    (held, rise), *later = curve
    for sparsity, next_rise in later:
        if next_rise is None:
            return held
        if next_rise > allowed:
            return held + (sparsity - held) * (allowed - rise) / (next_rise - rise)
        held, rise = sparsity, next_rise
    return held


def lowest_density(curve: Sequence[tuple[float, float | None]], allowed: float) -> float:
    """The lowest measured density down to which the rise stays within what is allowed.

    Args:
        curve: Density and rise of the loss, by falling density from 1 on.
        allowed: Largest rise.

    Example:
        >>> lowest_density([(1.0, 0.0), (0.5, 0.1), (0.25, 0.3), (0.1, 0.2)], allowed=0.2)
        0.5
    """
    held = 1.0
    for density, rise in curve:
        if rise is None or rise > allowed:
            break
        held = density
    return held


def rules_for(
    curves: dict[str, Sequence[tuple[float, float | None]]],
    shares: dict[str, float],
    allowed: float,
) -> list[dict[str, Any]]:
    """Rules of `smart.layers` that keep sensitive layers from being cut to where it hurts.

    Every layer may spend an even part of what is allowed, so that all together stay within it as
    far as their rises add up. A layer that does so even at the highest measured density is
    excluded, others keep the lowest density that they bear. The most sensitive for what they
    take come first, as long as they keep at most a fifth of the resource.

    Args:
        curves: For each layer density and rise of the loss, as :func:`lowest_density` takes them.
        shares: Share of the budget's resource that each layer takes; one without stays as it is.
        allowed: Largest rise of the whole network.

    Example:
        >>> stem, deep = [(1.0, 0.0), (0.5, 3.0)], [(1.0, 0.0), (0.5, 0.2)]
        >>> rules_for({'stem': stem, 'deep': deep}, {'stem': 0.01, 'deep': 0.99}, allowed=0.1)
        [{'pattern': 'stem', 'exclude': True}]
    """
    bears = {name: lowest_density(x, allowed / len(curves)) for name, x in curves.items()}

    def urgency(name: str) -> float:
        rise = next(rise for density, rise in curves[name] if density < bears[name])
        return math.inf if rise is None else rise / shares[name]

    frail = [name for name in shares if bears[name] > curves[name][-1][0]]
    rules, left = [], _PROTECTED
    for name in sorted(frail, key=urgency, reverse=True):
        kept = bears[name] * shares[name]
        if kept <= left:
            left -= kept
            floor = {'exclude': True} if bears[name] == 1 else {'min_density': bears[name]}
            rules.append({'pattern': name, **floor})
    return rules


def rules_from(
    rows: Sequence[dict[str, Any]], shares: dict[str, float], allowed: float
) -> list[dict[str, Any]]:
    """:func:`rules_for` rows of probes, the dense one first."""
    return rules_for(_curves(rows), shares, allowed)


def summary(
    rows: Sequence[dict[str, Any]], shares: dict[str, dict[str, float]], allow: str | float
) -> dict[str, Any]:
    """What the rows of all probes say: losses by layer and of the net, and what to ask for.

    `proposals` has for each resource the `sparsity` up to which the loss of the whole net stays
    within what is allowed, rounded down, and the rules (`layers`) that it needs; `limit` says why
    it is not higher: 'loss', 'measured' (a higher one was not) or 'floors' (of the rules).
    `lowest_density` of a layer is the lowest measured one at which it alone raises the loss by no
    more than its even part of what is allowed.

    Args:
        rows: What `mmsmart.engine.sensitivity.measure` gave.
        shares: For each resource, share of it that each layer takes.
        allow: Rise of the loss that is allowed; see :func:`allowed_rise`.
    """
    dense = rows[0]['loss']
    allowed = allowed_rise(allow, dense)
    curves = _curves(rows)
    layers = [
        {
            'name': name,
            'lowest_density': lowest_density(curve, allowed / len(curves)),
            'losses': [_only(x, 'density', 'kept', 'loss') for x in rows if x.get('name') == name],
        }
        for name, curve in curves.items()
    ]
    network, proposals = {}, {}
    for resource, own in shares.items():
        rules = rules_from(rows, own, allowed)
        network[resource], found = {}, []
        for name, more in {'plain': [], **({'protected': rules} if rules else {})}.items():
            mine = [x for x in rows if x.get('resource') == resource and x['rules'] == more]
            reached = [x for x in mine if 'reason' not in x]
            network[resource][name] = [_only(x, 'sparsity', 'kept', 'loss') for x in reached]
            curve = [(0.0, 0.0), *((x['sparsity'], _rise(x, dense)) for x in reached)]
            held = highest_sparsity(curve, allowed)
            if held < curve[-1][0]:
                limit = 'loss'
            else:
                limit = 'floors' if len(reached) < len(mine) else 'measured'
            held = math.floor(held * 100 + 1e-9) / 100
            found.append({'sparsity': held, 'limit': limit, 'layers': more})
        proposals[resource] = max(reversed(found), key=lambda x: x['sparsity'])
    return {
        'loss': dense,
        'allow': str(allow),
        'allowed': allowed,
        'layers': layers,
        'network': network,
        'proposals': proposals,
    }


def smart_text(proposal: dict[str, Any], **smart: Any) -> str:
    """The `smart = dict(...)` that asks for what is proposed, to be pasted into a config.

    Args:
        proposal: One of the `proposals` of :func:`summary`.
        smart: Other keys of `smart`; the proposed rules follow those of `layers`.

    Example:
        >>> proposal = {'sparsity': 0.6, 'layers': [{'pattern': 'stem', 'exclude': True}]}
        >>> print(smart_text(proposal, resource='macs'))
        smart = dict(
            sparsity=0.6,
            resource='macs',
            layers=[
                dict(pattern='stem', exclude=True),
            ],
        )
    """
    rules = [*smart.pop('layers', []), *proposal['layers']]
    lines = [
        f'{key}={value!r}' for key, value in {'sparsity': proposal['sparsity'], **smart}.items()
    ]
    if rules:
        written = (', '.join(f'{key}={value!r}' for key, value in x.items()) for x in rules)
        lines.append('layers=[\n' + ''.join(f'        dict({x}),\n' for x in written) + '    ]')
    return 'smart = dict(\n' + ''.join(f'    {line},\n' for line in lines) + ')'


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float | None]]]:
    """Density and rise of the loss of each layer, from 1 on."""
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        if row['what'] == 'layer':
            curve = curves.setdefault(row['name'], [(1.0, 0.0)])
            curve.append((row['density'], _rise(row, rows[0]['loss'])))
    return curves


def _rise(row: dict[str, Any], dense: float) -> float | None:
    return None if row['loss'] is None else row['loss'] - dense


def _only(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: row[key] for key in keys}
