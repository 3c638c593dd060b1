"""Channels-last is a matter of speed alone."""

from __future__ import annotations

import torch

from engine.runs import apart, smart_config, train_here

SHORT = dict(train_cfg=dict(max_epochs=2), param_scheduler=dict(T_max=2))


def formats(config):
    """Layouts of a masked convolution in training, and the files at the end."""
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    seen = []

    @HOOKS.register_module(force=True)
    class LayoutWitness(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            weight = runner.model.backbone.layer2[0].conv1.weight
            seen.append(weight.is_contiguous(memory_format=torch.channels_last))

    config['custom_hooks'] = [*config['custom_hooks'], dict(type='LayoutWitness')]
    config['custom_hooks'].append(dict(type='Witness'))
    train_here(config)
    return seen


def test_run_ends_like_one_without_it(tmp_path):
    ends = []
    for name, hooks in (('with', [dict(type='mmsmart.ChannelsLastHook')]), ('without', [])):
        config = smart_config(tmp_path / name, custom_hooks=hooks, **SHORT)
        outcome = apart(formats, config, log=tmp_path / f'{name}.log')
        assert outcome.error is None, outcome.log
        assert set(outcome.value) == {name == 'with'}
        ends.append(torch.load(tmp_path / name / 'pruned.pth', weights_only=True)['state_dict'])
    one, other = ends
    assert all(value.is_contiguous() for value in one.values())
    for key, value in other.items():
        torch.testing.assert_close(one[key], value, rtol=1e-2, atol=1e-3, msg=key)
    assert sum(int((value == 0).sum()) for key, value in one.items() if 'conv' in key) > 0
