"""Tests of mmsmart.sensitivity; what measures a trained network is tested in `engine/`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmsmart.install import install_masks
from mmsmart.sensitivity import (
    Grid,
    allowed_rise,
    draw_sensitivity,
    fresh_statistics,
    highest_sparsity,
    lowest_density,
    parts_of,
    rows_of,
    rules_for,
    silenced,
    smart_text,
    summary,
)

SHARES = st.floats(0.01, 0.99)
RISES = st.one_of(st.floats(-1, 10), st.none())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


# Probes


def test_a_thinned_layer_keeps_its_top_blocks_and_the_others_keep_all(net):
    masks = install_masks(net, 0.0, block=(2, 1, 1, 1))
    first, second = parts_of(masks)
    importance = torch.randn(masks.num_blocks)
    kept = second.thinned(importance, 0.5)
    assert bool(kept[: first.blocks.stop].all())
    own = importance[second.blocks.start :]
    assert set(own[kept[second.blocks.start :]].tolist()) == set(own.topk(8).values.tolist())
    assert second.share(kept) == 0.5 and first.share(kept) == 1


@pytest.mark.parametrize('density', [0.0, 0.04, 0.5, 1.0])
def test_silent_blocks_are_zero_inside_and_come_back_bit_for_bit(net, density):
    masks = install_masks(net, 0.0, block=(4, 2, 1, 1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    part = parts_of(masks)[0]
    kept = part.thinned(torch.randn(masks.num_blocks), density)
    with silenced(masks, kept):
        zeros = int((net[0].weight == 0).sum())
        assert zeros == round((1 - part.share(kept)) * net[0].weight.numel())
        assert torch.equal(net[3].weight, before['3.weight'])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_weights_come_back_after_an_error_too(net):
    masks = install_masks(net, 0.0, block=(4, 2, 1, 1))
    before = net[0].weight.detach().clone()
    with (
        pytest.raises(ZeroDivisionError),
        silenced(masks, torch.zeros(masks.num_blocks, dtype=torch.bool)),
    ):
        raise ZeroDivisionError
    assert torch.equal(net[0].weight, before)


def test_norms_hold_fresh_statistics_inside_and_their_own_afterwards(net):
    net.eval()
    images = torch.randn(6, 3, 8, 8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad(), fresh_statistics([net[1]], lambda: net(images)):
        features = net[0](images)
        torch.testing.assert_close(net[1].running_mean, features.mean((0, 2, 3)))
        torch.testing.assert_close(net[1].running_var, features.var((0, 2, 3)))
        assert not net[1].training
    assert net[1].momentum == 0.1 and not net[1].training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# From losses to a proposal


def test_a_rise_is_a_number_or_a_share_of_the_loss():
    assert allowed_rise(0.1, 4.0) == allowed_rise('0.1', 4.0) == 0.1
    assert allowed_rise('5%', 4.0) == pytest.approx(0.2)


@pytest.mark.parametrize('allow', ['much', '0', '-1%', 'inf', 'nan', ''])
def test_a_rise_that_is_none_is_refused(allow):
    with pytest.raises(ValueError, match='allow: expected a rise of the loss above 0'):
        allowed_rise(allow, 1.0)


def test_a_share_of_a_loss_of_zero_is_refused():
    with pytest.raises(ValueError, match='Give the rise itself'):
        allowed_rise('5%', 0.0)


@given(st.lists(st.tuples(SHARES, RISES), max_size=8, unique_by=lambda x: x[0]), st.floats(0.01, 2))
def test_a_proposed_sparsity_lies_before_the_first_rise_that_is_too_high(points, allowed):
    curve = [(0.0, 0.0), *sorted(points)]
    found = highest_sparsity(curve, allowed)
    bad = [s for s, rise in curve if rise is None or rise > allowed]
    good = [s for s, _ in curve if not bad or s < bad[0]]
    assert good[-1] <= found <= (bad[0] if bad else curve[-1][0])
    if not bad:
        assert found == curve[-1][0]


@given(st.lists(st.tuples(SHARES, RISES), max_size=8, unique_by=lambda x: x[0]), st.floats(0.01, 2))
def test_a_layer_bears_all_measured_densities_down_to_its_lowest(points, allowed):
    curve = [(1.0, 0.0), *sorted(points, reverse=True)]
    lowest = lowest_density(curve, allowed)
    borne = [rise for density, rise in curve if density >= lowest]
    assert all(rise is not None and rise <= allowed for rise in borne)
    below = [rise for density, rise in curve if density < lowest]
    assert not below or below[0] is None or below[0] > allowed


@given(st.lists(st.tuples(st.floats(0.01, 1), RISES, RISES), min_size=1, max_size=10))
def test_rules_spare_layers_that_fail_and_at_most_a_fifth_of_the_net(layers):
    total = sum(share for share, *_ in layers)
    shares = {f'layer{i}': share / total for i, (share, *_) in enumerate(layers)}
    curves = {
        name: [(1.0, 0.0), (0.5, one), (0.1, other)]
        for name, (_, one, other) in zip(shares, layers)
    }
    rules = rules_for(curves, shares, allowed=1.0)
    even = 1.0 / len(layers)
    kept = 0.0
    for rule in rules:
        bears = lowest_density(curves[rule['pattern']], even)
        assert rule.get('min_density', 1) == bears > 0.1
        kept += bears * shares[rule['pattern']]
    assert kept <= 0.2 + 1e-9


def rows(layers, network, rules=()):
    return [
        {'what': 'dense', 'kept': 1.0, 'loss': 1.0},
        *(
            {'what': 'layer', 'name': name, 'density': d, 'kept': d, 'loss': loss}
            for name, losses in layers.items()
            for d, loss in losses.items()
        ),
        *(
            {'what': 'network', 'resource': 'params', 'sparsity': s, 'rules': rules_, **found}
            for rules_, curve in network
            for s, found in curve.items()
        ),
    ]


def reached(loss):
    return {'kept': 0.5, 'loss': loss}


STEM = [{'pattern': 'stem', 'exclude': True}]
LAYERS = {'stem': {0.5: 9.0}, 'deep': {0.5: 1.01}}
PLAIN = ([], {0.4: reached(1.1), 0.8: reached(5.0)})
SPARED = {0.4: reached(1.05), 0.8: reached(1.15)}
TOO_HIGH = {'kept': None, 'loss': None, 'reason': 'floors'}


@pytest.mark.parametrize(
    ('spared', 'sparsity', 'limit', 'layers'),
    [
        (SPARED, 0.8, 'measured', STEM),
        ({**SPARED, 0.9: TOO_HIGH}, 0.8, 'floors', STEM),
        ({**SPARED, 0.9: reached(1.25)}, 0.85, 'loss', STEM),
        # 0.1 of the 3.9 by which the loss rises between 0.4 and 0.8
        ({0.4: reached(1.05), 0.8: reached(None)}, 0.41, 'loss', []),
    ],
    ids=['all held', 'floors in the way', 'too high a loss', 'no finite loss: plain is better'],
)
def test_the_better_of_plain_and_spared_is_proposed_with_what_limits_it(
    spared, sparsity, limit, layers
):
    shares = {'params': {'stem': 0.1, 'deep': 0.9}}
    report = summary(rows(LAYERS, [PLAIN, (STEM, spared)]), shares, '20%')
    found = report['proposals']['params']
    assert found == {'sparsity': sparsity, 'limit': limit, 'layers': layers}


def test_the_proposed_text_is_the_smart_of_a_config():
    proposal = {'sparsity': 0.5, 'layers': [{'pattern': 'deep', 'min_density': 0.25}]}
    names: dict = {}
    exec(smart_text(proposal, resource='macs', layers=STEM), names)
    assert names['smart'] == dict(
        sparsity=0.5, resource='macs', layers=[*STEM, dict(pattern='deep', min_density=0.25)]
    )


def test_a_picture_is_drawn_of_many_layers_and_of_losses_that_are_not_finite(tmp_path):
    layers = {f'backbone.layer{i}': {0.5: 1 + i / 10, 0.1: None} for i in range(40)}
    shares = {'params': dict.fromkeys(layers, 1 / 40)}
    report = summary(rows(layers, [([], {0.5: reached(2.0), 0.9: reached(None)})]), shares, 0.1)
    draw_sensitivity({**report, 'images': 4, 'data': 'training'}, tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


# Rows


def test_rows_cut_off_by_a_kill_are_dropped_and_those_of_other_settings_refused(tmp_path):
    file = tmp_path / 'rows.jsonl'
    assert rows_of(file, {'images': 4}) == []
    file.write_text('{"settings": {"images": 4}}\n{"what": "dense"}\n{"what": "lay')
    assert rows_of(file, {'images': 4}) == [{'what': 'dense'}]
    with pytest.raises(ValueError, match=r'resume: .* was measured with another images'):
        rows_of(file, {'images': 8})


@pytest.mark.parametrize(
    ('grid', 'message'),
    [
        (dict(densities=[1.0]), r'densities: .* between 0 and 1, got \[1.0\]'),
        (dict(sparsities=[]), 'sparsities: expected numbers'),
        (dict(resources=['energy']), r"resources: got \['energy'\], allowed are"),
    ],
)
def test_a_grid_out_of_range_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        Grid(**grid)
