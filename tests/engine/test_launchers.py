"""`dist_train.sh` and `slurm_train.sh`, and what can't be launched is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.runs import (
    REPO,
    apart,
    assert_nothing_written,
    assert_on_budget,
    smart_config,
    train_here,
    with_parts,
    write_config,
)

TOOLS = REPO / 'tools'


def launched(tmp_path: Path, script: str, program: str, *arguments: str, **variables: str):
    """What a script would have started, by a program of this name that only notes it."""
    noted = tmp_path / 'noted'
    stand_in = tmp_path / 'bin' / program
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {noted}\nexit 3\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, **variables, 'PATH': f'{stand_in.parent}:{os.environ["PATH"]}'}
    done = subprocess.run(
        ['bash', TOOLS / script, *arguments], env=environment, capture_output=True, text=True
    )
    return done, noted.read_text().splitlines() if noted.exists() else None


def test_dist_train_starts_a_process_a_gpu_with_the_arguments_of_its_siblings(tmp_path):
    done, noted = launched(
        tmp_path, 'dist_train.sh', 'python', 'a.py', '4', '--work-dir', 'some where', '--amp',
        PORT='123', NNODES='2', NODE_RANK='1',
    )  # fmt: skip
    assert done.returncode == 3, 'that of the training'
    assert noted[:2] == ['-m', 'torch.distributed.run']
    assert {'--nproc_per_node=4', '--nnodes=2', '--node_rank=1', '--master_port=123'} <= {*noted}
    rest = ['a.py', '--launcher', 'pytorch', '--work-dir', 'some where', '--amp']
    assert noted[-7:] == [str(TOOLS / 'train.py'), *rest]


def test_slurm_train_asks_for_a_task_a_gpu_with_the_arguments_of_its_siblings(tmp_path):
    done, noted = launched(
        tmp_path, 'slurm_train.sh', 'srun', 'gpus', 'job', 'a.py', '--work-dir', 'some where',
        GPUS='16', SRUN_ARGS='--quotatype=auto --exclude=n1',
    )  # fmt: skip
    assert done.returncode == 3
    assert noted[:3] == ['-p', 'gpus', '--job-name=job']
    assert {'--ntasks=16', '--ntasks-per-node=8', '--quotatype=auto', '--exclude=n1'} <= {*noted}
    rest = ['a.py', '--launcher=slurm', '--work-dir', 'some where']
    assert noted[-7:] == ['python', '-u', str(TOOLS / 'train.py'), *rest]


@pytest.mark.parametrize('script', ['dist_train.sh', 'slurm_train.sh'])
def test_a_missing_argument_is_answered_by_the_usage(tmp_path, script):
    done, noted = launched(tmp_path, script, 'python', 'a.py')
    assert done.returncode != 0 and noted is None
    assert f'usage: {script}' in done.stderr


@pytest.mark.slow
def test_dist_train_prunes_on_two_cpus(tmp_path):
    config = smart_config(tmp_path / 'work', train_dataloader=dict(batch_size=8))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', TOOLS / 'dist_train.sh', write_config(tmp_path / 'config.py', config), '2'],
        env={**os.environ, 'PATH': path, 'PYTHONPATH': str(REPO), 'PORT': str(port),
             'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_on_budget(tmp_path / 'work')
    assert 'Distributed training: True' in done.stdout + done.stderr


def refused(tmp_path: Path, function, *arguments) -> str:
    outcome = apart(function, *arguments, log=tmp_path / 'log.txt')
    assert outcome.error is not None and outcome.error.startswith('ValueError'), outcome.log
    assert_nothing_written(tmp_path / 'work')
    return outcome.error


@pytest.mark.parametrize('strategy', ['FSDPStrategy', 'DeepSpeedStrategy', 'DDPStrategy'])
def test_a_strategy_is_refused_with_what_to_do_instead(tmp_path, strategy):
    config = {**smart_config(tmp_path / 'work'), 'strategy': dict(type=strategy)}
    message = refused(tmp_path, train_here, config)
    assert f'strategy: {strategy}' in message and 'tools/dist_train.sh' in message


def test_a_sharding_model_wrapper_is_refused(tmp_path):
    wrapper = dict(type='MMFullyShardedDataParallel')
    config = smart_config(tmp_path / 'work', model_wrapper_cfg=wrapper, launcher='pytorch')
    message = refused(tmp_path, train_here_as_one_of_one, config)
    assert 'model_wrapper_cfg.type: MMFullyShardedDataParallel' in message


def train_here_as_one_of_one(config):
    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        os.environ['MASTER_PORT'] = str(free.getsockname()[1])
    return train_here(config)


def test_slurm_without_gpus_is_refused(tmp_path):
    config = smart_config(tmp_path / 'work', launcher='slurm')
    assert "launcher: 'slurm'" in refused(tmp_path, train_here, config)


def test_the_parts_by_hand_refuse_the_flexible_runner(tmp_path):
    message = refused(tmp_path, train_flexibly, with_parts(smart_config(tmp_path / 'work')))
    assert 'runner_type: FlexibleRunner (strategy SingleDeviceStrategy)' in message
    assert 'mmsmart.SmartRunner' in message


def train_flexibly(config):
    from mmengine.config import Config
    from mmengine.runner import FlexibleRunner

    FlexibleRunner.from_cfg(Config(config)).train()
