"""What `llmfoundry launch` renders: valid for its system, the same for every node but for rank and address, and the ready files are what it renders now."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmfoundry.cli import launch as launch_cli
from llmfoundry.command_utils.launch import submit as submit_module
from llmfoundry.command_utils.launch.job import LaunchJob, dns_name, make_job, seconds_of
from llmfoundry.command_utils.launch.render import fill, node_script, render
from llmfoundry.errors import ConfigError, LaunchError
from tests.helpers.workspace import ROOT

READY_FILES = sorted(p for p in (ROOT / 'launch').iterdir() if p.suffix != '.md')
YAML = 'yamls/pretrain/mpt-125m.yaml'
CPU = {'gpus': 0, 'processes': 2, 'nodes': 2, 'name': 'Tiny Run_1'}


def _job(system: str, **options: Any) -> LaunchJob:
    return make_job(system, YAML, 'llmfoundry launch', **{**CPU, **options})


def _shell_is_valid(text: str) -> bool:
    return subprocess.run(['bash', '-n'], input=text, text=True, check=False).returncode == 0


def _node_environment(script: str, **variables: str) -> dict[str, str]:
    """Runs a node's script with a ``composer`` that prints its environment and arguments."""
    fake = 'composer() { env; echo "ARGUMENTS=$*"; }; '
    done = subprocess.run(['bash', '-c', fake + script.replace('exec composer', 'composer')], env={'PATH': '/usr/bin:/bin', **variables}, capture_output=True, text=True, check=True)
    return dict(line.split('=', 1) for line in done.stdout.splitlines() if '=' in line)


@pytest.mark.parametrize('path', READY_FILES, ids=lambda p: p.name)
def test_ready_files_are_what_the_command_renders(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    command = next(line for line in text.splitlines() if line.startswith('# Rendered by: ')).removeprefix('# Rendered by: ')
    monkeypatch.setattr(sys, 'argv', [*shlex.split(command), '--no-validate'])
    monkeypatch.chdir(ROOT)
    from llmfoundry.cli import app

    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 0
    assert capsys.readouterr().out == text
    overrides = [a for a in shlex.split(command) if a.endswith('.yaml')]
    assert (ROOT / overrides[0]).is_file()


def test_there_is_a_ready_file_for_each_system() -> None:
    assert [p.name for p in READY_FILES] == ['k8s-job.yaml', 'k8s-pytorchjob.yaml', 'nodes.sh', 'skypilot.yaml', 'slurm.sbatch']


@pytest.mark.parametrize('path', READY_FILES, ids=lambda p: p.name)
def test_ready_files_are_valid(path: Path) -> None:
    text = path.read_text()
    if path.suffix == '.yaml':
        assert all(isinstance(document, dict) for document in yaml.safe_load_all(text))
    else:
        assert _shell_is_valid(text)
        assert text.startswith('#!/bin/bash\n')


def _scripts() -> dict[str, tuple[str, dict[str, str]]]:
    """System -> what its second of two nodes runs, and what the system sets there."""
    job, pytorchjob = (list(yaml.safe_load_all(render(_job('k8s', kind=kind)))) for kind in ('job', 'pytorchjob'))
    worker = pytorchjob[0]['spec']['pytorchReplicaSpecs']['Worker']['template']['spec']['containers'][0]
    slurm = render(_job('slurm'))
    return {
        'local': (render(_job('local')), {'NODE_RANK': '1', 'MASTER_ADDR': '10.0.0.1'}),
        'slurm': (slurm.split("<<'NODE'\n")[1].split('\nNODE\n')[0], {'SLURM_NODEID': '1', 'SLURM_JOB_ID': '7', 'JOB_MASTER_ADDR': 'node-a'}),
        'k8s job': (job[1]['spec']['template']['spec']['containers'][0]['args'][0], {'JOB_COMPLETION_INDEX': '1'}),
        'k8s pytorchjob': (worker['args'][0], {'RANK': '1'}),
        'sky': (yaml.safe_load(render(_job('sky')))['run'], {'SKYPILOT_NODE_RANK': '1', 'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2'}),
    }


@pytest.mark.parametrize(
    ('system', 'address', 'port'),
    [
        ('local', '10.0.0.1', '7501'), ('slurm', 'node-a', '20007'), ('k8s job', 'tiny-run-1-0.tiny-run-1', '7501'), ('k8s pytorchjob', 'tiny-run-1-master-0', '7501'),
        ('sky', '10.0.0.1', '7501'),
    ],
)
def test_every_system_runs_the_same_on_a_node(system: str, address: str, port: str) -> None:
    """The script is executed with a composer that reports what it was given."""
    script, variables = _scripts()[system]
    seen = _node_environment(script, **variables)
    assert {name: seen[name] for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT')} == {
        'WORLD_SIZE': '4', 'LOCAL_WORLD_SIZE': '2', 'NODE_RANK': '1', 'MASTER_ADDR': address, 'MASTER_PORT': port,
    }
    assert seen['ARGUMENTS'] == f'scripts/train/train.py {YAML}'


def test_indexed_job_counts_agree() -> None:
    service, job = yaml.safe_load_all(render(_job('k8s', nodes=3, gpus=8, processes=None, volumes=['claim:/data'], time='2h', queue='team')))
    spec = job['spec']
    pod = spec['template']['spec']
    assert (service['kind'], job['kind'], job['apiVersion']) == ('Service', 'Job', 'batch/v1')
    assert spec['completionMode'] == 'Indexed'
    assert spec['completions'] == spec['parallelism'] == 3
    assert service['metadata']['name'] == pod['subdomain'] == job['metadata']['name'] == service['spec']['selector']['job-name']
    assert service['spec']['clusterIP'] == 'None'
    assert service['spec']['publishNotReadyAddresses'] is True  # node 0's name has to resolve before it is ready
    assert pod['restartPolicy'] == 'Never'
    assert spec['activeDeadlineSeconds'] == 7200
    container = pod['containers'][0]
    assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
    assert 'WORLD_SIZE=24 LOCAL_WORLD_SIZE=8' in container['args'][0]
    assert service['spec']['ports'][0]['port'] == container['ports'][0]['containerPort'] == 7501
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']} == {'shm', 'volume-0'}
    assert job['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'team'}


def test_pytorchjob_counts_agree() -> None:
    (job,) = yaml.safe_load_all(render(_job('k8s', kind='pytorchjob', nodes=4, gpus=8, processes=None)))
    replicas = job['spec']['pytorchReplicaSpecs']
    assert (job['kind'], job['apiVersion']) == ('PyTorchJob', 'kubeflow.org/v1')
    assert (replicas['Master']['replicas'], replicas['Worker']['replicas']) == (1, 3)
    for replica in replicas.values():
        container = replica['template']['spec']['containers'][0]
        assert container['name'] == 'pytorch'  # the operator sets RANK in the container of this name only
        assert 'WORLD_SIZE=32 LOCAL_WORLD_SIZE=8' in container['args'][0]
    (alone,) = yaml.safe_load_all(render(_job('k8s', kind='pytorchjob', nodes=1)))
    assert list(alone['spec']['pytorchReplicaSpecs']) == ['Master']


def test_slurm_header() -> None:
    text = render(_job('slurm', gpus=4, processes=None, nodes=2, time='1-02:03:04', queue='train', memory='500G', options=('account=team', '--qos=high')))
    header = [line for line in text.splitlines() if line.startswith('#SBATCH')]
    assert header[:8] == [
        '#SBATCH --job-name=tiny-run-1', '#SBATCH --nodes=2', '#SBATCH --ntasks-per-node=1', '#SBATCH --cpus-per-task=32', '#SBATCH --gpus-per-node=4', '#SBATCH --mem=500G',
        '#SBATCH --time=1-02:03:04', '#SBATCH --partition=train',
    ]
    assert {'#SBATCH --account=team', '#SBATCH --qos=high', '#SBATCH --requeue'} <= set(header)
    assert _shell_is_valid(text)


def test_values_are_quoted_for_the_shell(tmp_path: Path) -> None:
    """A value with blanks, quotes and a dollar arrives as it was typed, through YAML too."""
    env, override = """it's $HOME "x" @{y}""", 'run_name=a b$(id)'
    for system in ('local', 'slurm', 'k8s', 'sky'):
        job = _job(system, env=[f'NOTE={env}'], overrides=[override], workdir=str(tmp_path), nodes=1)
        text = render(job)
        script = node_script(job, '0', 'host')
        if system in ('k8s', 'sky'):
            assert all(line in text for line in (f'export NOTE={shlex.quote(env)}', shlex.quote(override)))
            list(yaml.safe_load_all(text))
        seen = _node_environment(script)
        assert seen['NOTE'] == env
        assert seen['ARGUMENTS'] == f'scripts/train/train.py {YAML} {override}'
        assert seen['PWD'] == str(tmp_path)


def test_composer_counts_where_nothing_is_said() -> None:
    text = render(make_job('local', YAML, ''))
    assert 'WORLD_SIZE' not in text
    assert make_job('slurm', YAML, '').world_size == 8
    assert make_job('k8s', YAML, '', gpus=0).world_size == 1


def test_blocks_keep_their_indentation() -> None:
    assert fill('a:\n  @{x}\n  @{none}\nb: @{y}', {'x': 'one\ntwo', 'none': '', 'y': 3}) == 'a:\n  one\n  two\nb: 3\n'


@pytest.mark.parametrize(('text', 'seconds'), [('90m', 5400), ('36h', 129600), ('24:00:00', 86400), ('1-00:00:30', 86430), ('05:00', 300), ('soon', None), ('1:2', None)])
def test_time_limits(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(('text', 'name'), [('MPT_1b v2', 'mpt-1b-v2'), ('1b', 'run-1b'), ('-' * 9, 'run'), ('x' * 99, 'x' * 45)])
def test_names(text: str, name: str) -> None:
    assert dns_name(text) == name


def test_all_wrong_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        make_job('moon', YAML, '', gpus=8, processes=2, time='soon', env=['A B'], overrides=['nonsense'], kind='pod', volumes=['x'])
    assert [p.path for p in caught.value.problems] == ['--on', '--kind', '--processes', '--time', '[KEY=VALUE]', '--env', '--volume']


@pytest.mark.parametrize(('system', 'option'), [('local', 'options'), ('sky', 'volumes'), ('slurm', 'volumes'), ('k8s', 'options')])
def test_options_of_another_system_are_refused(system: str, option: str) -> None:
    with pytest.raises(ConfigError, match='has no meaning'):
        _job(system, **{option: ('claim:/x',)})


def test_a_missing_tool_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', '/nonexistent')
    with pytest.raises(LaunchError, match=r"'sbatch' is not on PATH, so nothing was submitted.*Without --submit the file is printed"):
        submit_module.submit(_job('slurm'), '')


@pytest.mark.parametrize(('system', 'tool', 'arguments'), [('slurm', 'sbatch', ''), ('k8s', 'kubectl', 'apply -f '), ('sky', 'sky', 'launch --yes ')])
def test_submitting_hands_the_rendered_text_to_the_tool(system: str, tool: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / tool
    fake.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/arguments\ncat "${{@: -1}}" > {tmp_path}/text\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    assert submit_module.submit(_job(system), 'the text') == 3
    assert (tmp_path / 'text').read_text() == 'the text'
    assert (tmp_path / 'arguments').read_text().startswith(arguments)


def test_the_yaml_is_checked_before_anything_is_submitted(tmp_path: Path) -> None:
    path = tmp_path / 'wrong.yaml'
    path.write_text('max_duraton: 1ba\n')
    with pytest.raises(ConfigError, match='max_duraton'):
        submit_module.launch('local', str(path), '', do_submit=True, validate=True, output=None)


def test_a_yaml_that_only_the_cluster_has_is_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit_module.launch('k8s', 'only/there.yaml', '', do_submit=False, validate=True, output=None, gpus=8) == 0
    printed = capsys.readouterr()
    assert 'not checked here' in printed.err
    assert list(yaml.safe_load_all(printed.out))


def test_header_leaves_out_what_does_not_change_the_text() -> None:
    assert launch_cli._command(['launch', '--on', 'slurm', 'x.yaml', '-o', 'f', '--submit', '--output', 'g', '--output=h']) == 'llmfoundry launch --on slurm x.yaml'


def test_launch_loads_no_torch() -> None:
    code = "import sys; sys.argv[1:] = ['launch', '--on', 'k8s', 'x.yaml']\nfrom llmfoundry.cli import app\ntry: app()\nfinally: assert not {'torch', 'composer', 'streaming', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
