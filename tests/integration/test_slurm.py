"""The rendered batch file on a real Slurm of two nodes: submitted with --submit, it trains as one process does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.helpers.slurm import Cluster, slurm_cluster
from tests.helpers.train_runs import ROOT, losses_in, make_data, run_config, tiny_config, train_losses
from tests.helpers.workspace import command_environment

# Real nodes do not share /dev/shm, in which Streaming and the data workers meet.
OWN_SHARED_MEMORY = '#!/bin/bash\nexec unshare --mount bash -c \'mount -t tmpfs tmpfs /dev/shm && exec "$@"\' bash {composer} "$@"\n'


@pytest.fixture(scope='module')
def cluster() -> Iterator[Cluster]:
    with slurm_cluster(num_nodes=2) as running:
        yield running


def test_the_rendered_batch_file_trains_on_two_nodes_as_one_process_does(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny_config(make_data(tmp_path / 'data'), loggers={'jsonl': {'path': str(tmp_path / 'metrics.jsonl')}})
    config['model']['resid_pdrop'] = 0.0
    (tmp_path / 'tiny.yaml').write_text(json.dumps(config))
    environment = command_environment(**cluster.environment)
    composer = subprocess.run(['which', 'composer'], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/composer').write_text(OWN_SHARED_MEMORY.format(composer=composer))
    (tmp_path / 'bin/composer').chmod(0o755)
    environment['PATH'] = f'{tmp_path}/bin:{environment["PATH"]}'

    command = [
        'llmfoundry', 'launch', '--on', 'slurm', '--nodes', '2', '--gpus', '0', '--processes', '1', '--time', '10m', '--partition', 'main', '--name', 'tiny',
        '--script', str(ROOT / 'scripts/train/train.py'), '--env', 'OMP_NUM_THREADS=1', '--submit', 'tiny.yaml', 'max_duration=5ba',
    ]
    submitted = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert '2 processes x device 4' in submitted.stderr  # the YAML was checked for the processes of the job
    job = submitted.stdout.split()[-1]
    state = cluster.wait_for_job(job, 400)
    output = (tmp_path / f'tiny-{job}.out').read_text()
    assert state == 'COMPLETED', output[-4000:]
    assert 'pre-flight: 2 ranks on 2 node(s) agree' in output
    expected = train_losses(run_config({**config, 'loggers': {'inmemory': {}}}, 'max_duration=5ba'))
    assert list(losses_in(tmp_path).values()) == pytest.approx(expected, abs=1e-5)
    assert len(expected) == 5
