"""What was pruned: the figures of `pruning.json`, and tables for the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import BlockLayer
from mmsmart.channels import pruned_weights
from mmsmart.cost import count_macs
from mmsmart.export import complete_or_absent, plain
from mmsmart.masking import BlockMasks
from mmsmart.plans import ChannelPlan, Plan

_AMOUNTS = ('budget', 'kept', 'next_block_cost')


def pruning_report(
    model: nn.Module,
    masks: BlockMasks,
    positions: dict[str, int],
    method: str,
    dense_metrics: dict[str, float],
    pruned_metrics: dict[str, float],
) -> dict[str, Any]:
    """The contents of `pruning.json` for a model whose masks are hard.

    `block` is written on the axes of the weight itself, clipped to the layer; the blocks of a layer
    with several `groups` are cut in each group apart. Parameters are all parameters of the model;
    MACs are those of its convolutions and linear layers for one image.

    Of coupled channels, `block` is 'channel', blocks are a layer's output channels, its parameters
    include the bias, norms have rows too, and `groups` lists which layers lose channels together.

    `budgets` has an entry for every part and resource; `budget`, `kept`, `next_block_cost` and the
    sparsities beside them are those of `resource` over all parts (the largest next block). A layer
    `at_floor` keeps just what it must. Latencies are there if there is a table.
    """
    plan, kept = masks.plan, masks.hard_mask().bool()
    rows = (_channel_rows if isinstance(plan, ChannelPlan) else _block_rows)(plan, kept, positions)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order.get(row['name'], -1))
    at_floor = masks.at_floor()
    for row in rows:
        row['at_floor'] = row['name'] in at_floor
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = count_macs(model, positions)
    params_cut = sum(row['params_total'] - row['params_kept'] for row in rows)
    macs_cut = sum(row['macs_total'] - row['macs_kept'] for row in rows)
    report = {
        'method': method,
        'resource': masks.resource,
        'target_sparsity': masks.sparsity,
        'achieved_sparsity': 1 - masks.kept_cost() / masks.total_cost,
        'budget': masks.budget,
        'kept': masks.kept_cost(),
        'next_block_cost': masks.next_block_cost(),
        'budgets': _budget_rows(masks),
        'dense': {'params': params, 'macs': macs, **dense_metrics},
        'pruned': {'params': params - params_cut, 'macs': macs - macs_cut, **pruned_metrics},
        'layers': rows,
        'excluded': [{'name': item.name, 'reason': item.reason} for item in masks.excluded],
    }
    if masks.latency is not None:
        _add_latencies(report, masks)
    if isinstance(plan, ChannelPlan):
        report['groups'] = [
            {
                'name': group.name,
                'layers': list(group.layers),
                'channels_total': len(group.units),
                'channels_kept': int(kept[list(group.units)].sum()),
            }
            for group in plan.groups
        ]
    return plain(report)


def _budget_rows(masks: BlockMasks) -> list[dict[str, Any]]:
    rows = zip(masks.budgets, masks.kept_costs(), masks.next_block_costs())
    return [
        {
            'part': budget.target.part,
            'resource': budget.target.resource,
            'unit': budget.unit,
            'target_sparsity': budget.target.sparsity,
            'achieved_sparsity': 1 - kept / budget.total,
            'total': budget.total,
            'budget': budget.amount,
            'kept': kept,
            'next_block_cost': following,
        }
        for budget, kept, following in rows
    ]


def _add_latencies(report: dict[str, Any], masks: BlockMasks) -> None:
    """What the table says of every layer that it can speak of, dense and pruned."""
    blocks = {layer.name: layer for layer in masks.layers}
    for row in report['layers']:
        if len(row['shape']) == 1:
            continue  # a norm: part of the layer before it
        share = row['params_kept'] / row['params_total']
        if row['block'] == 'channel':
            curve = masks.latency.of_layers([row['name']])
            dense, pruned = (float(curve.at(torch.tensor([x]))[0]) for x in (1.0, share))
        else:
            cost = masks.latency.of_blocks([blocks[row['name']]])
            shares = torch.ones(row['blocks_total'], dtype=torch.float64)
            dense = cost.of(shares)
            entry = masks.latency.entry(row['name'])
            count = row['blocks_kept'] / row['blocks_total']
            pruned = cost.of(shares * (share if entry.block is None else count))
        row['latency_total'], row['latency_kept'] = dense, pruned
    for key, kind in (('total', 'dense'), ('kept', 'pruned')):
        sums = sum(row.get(f'latency_{key}', 0.0) for row in report['layers'])
        report[kind] = {**report[kind], 'latency': sums}


def _block_rows(plan: Plan, kept: Tensor, positions: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for layer, stays in zip(plan.layers, kept.split(plan.layer_sizes)):
        sizes = layer.sizes().to(kept.device)
        used = positions.get(layer.name, 0)
        total, left = int(sizes.sum()), int(sizes[stays].sum())
        rows.append(
            {
                'name': layer.name,
                'shape': list(layer.weight.shape),
                'block': list(layer.weight_block) if layer.n_of_m is None else _pattern(layer),
                'groups': layer.groups,
                'blocks_total': len(stays),
                'blocks_kept': int(stays.sum()),
                'params_total': total,
                'params_kept': left,
                'macs_total': total * used,
                'macs_kept': left * used,
            }
        )
    return rows


def _pattern(layer: BlockLayer) -> str:
    return f'{layer.n_of_m[0]}:{layer.n_of_m[1]}'


def _channel_rows(
    plan: ChannelPlan, kept: Tensor, positions: dict[str, int]
) -> list[dict[str, Any]]:
    rows = []
    for layer in plan.channels:
        gone = {key: int(where.sum()) for key, where in pruned_weights(layer, kept)}
        total = sum(p.numel() for p in layer.module.parameters(recurse=False))
        used, weights = positions.get(layer.name, 0), layer.module.weight.numel()
        channels = layer.kept(kept).out
        rows.append(
            {
                'name': layer.name,
                'shape': list(layer.module.weight.shape),
                'block': 'channel',
                'groups': getattr(layer.module, 'groups', 1),
                'blocks_total': len(layer.out),
                'blocks_kept': len(layer.out) if channels is None else len(channels),
                'params_total': total,
                'params_kept': total - sum(gone.values()),
                'macs_total': weights * used,
                'macs_kept': (weights - gone['weight']) * used,
            }
        )
    return rows


def save_report(report: dict[str, Any], path: str | Path) -> None:
    """Write `pruning.json`; NaN and infinity, which JSON does not know, become null."""
    report = json.loads(json.dumps(report), parse_constant=lambda name: None)
    with complete_or_absent(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + '\n')


def weighted_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of convolutions and linear layers, without the norms."""
    return [row for row in report['layers'] if len(row['shape']) > 1]


def summary_tables(report: dict[str, Any]) -> list[Any]:
    """Dense and pruned side by side, then one row a layer, as tables for `rich.print`."""
    from rich.table import Table

    both = Table(title='dense and pruned')
    for title in ('', 'dense', 'pruned', 'change'):
        both.add_column(title, justify='left' if not title else 'right')
    for key, dense in report['dense'].items():
        pruned = report['pruned'].get(key)
        if key in ('params', 'macs'):
            change = f'{pruned / dense - 1:+.1%}' if dense else ''
            both.add_row(key, f'{dense:,}', f'{pruned:,}', change)
        elif isinstance(dense, (int, float)) and isinstance(pruned, (int, float)):
            both.add_row(key, f'{dense:.2f}', f'{pruned:.2f}', f'{pruned - dense:+.2f}')
    budgets = Table(title='budgets')
    for title in ('', 'sparsity asked', 'got', 'budget', 'kept', 'next block'):
        budgets.add_column(title, justify='left' if not title else 'right')
    for row in report['budgets']:
        budgets.add_row(
            f'{row["unit"]} of {row["part"]}' if row['part'] else row['unit'],
            f'{row["target_sparsity"]:.1%}',
            f'{row["achieved_sparsity"]:.2%}',
            *(
                f'{row[key]:,.6g}' if row['budget'] < 1e4 else f'{row[key]:,.0f}'
                for key in _AMOUNTS
            ),
        )
    layers = Table(caption='* at its floor' if any(x['at_floor'] for x in report['layers']) else '')
    layers.add_column('layer', overflow='fold')
    what = 'channels kept' if 'groups' in report else 'blocks kept'
    for title in ('weight', what, 'density'):
        layers.add_column(title, justify='right', no_wrap=True)
    for row in weighted_rows(report):
        layers.add_row(
            row['name'],
            'x'.join(map(str, row['shape'])),
            f'{row["blocks_kept"]}/{row["blocks_total"]}{"*" if row["at_floor"] else ""}',
            f'{row["params_kept"] / row["params_total"]:.1%}',
        )
    return [both, budgets, layers]
