"""Fills the templates of ``assets/launch``.

A placeholder is ``@{name}``, since ``$`` belongs to the shell. One that stands alone on its line takes a block of lines, indented as it is, and an empty block takes the line away: so the
text that a node runs is written once (``node.sh``) and put into a shell script, a batch file and YAML alike.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import string
from importlib import resources
from typing import Callable, Mapping

from llmfoundry.command_utils.launch.job import DEFAULT_PORT, LaunchJob

__all__ = ['fill', 'node_script', 'render']

_ALONE = re.compile(r'( *)@\{(\w+)\}')


class _Template(string.Template):
    delimiter = '@'


def fill(template: str, values: Mapping[str, object]) -> str:
    """The template with every placeholder filled; an unknown one is a KeyError."""
    lines: list[str] = []
    for line in template.splitlines():
        alone = _ALONE.fullmatch(line)
        if alone is None:
            lines.append(_Template(line).substitute(values))
        else:
            block = str(values[alone[2]])
            lines += [f'{alone[1]}{text}'.rstrip() for text in block.splitlines()]
    return '\n'.join(lines) + '\n'


def render(job: LaunchJob) -> str:
    """The file that starts ``job`` on its system."""
    return _SYSTEMS[job.system](dataclasses.replace(job, command=' '.join(job.command.split('\n'))))  # stays within its comment


def node_script(job: LaunchJob, node_rank: str, master_addr: str, master_port: str | None = None, time_limit: bool = False) -> str:
    """What every node runs, as shell text.

    Args:
        node_rank: shell expression for the node's rank, such as ``$SLURM_NODEID``.
        master_addr: shell expression for the address of node 0.
        master_port: shell expression for its port; by default the job's.
        time_limit: keep the job's time limit here, for a system that keeps none itself.
    """
    counts = '' if job.processes is None else f'export WORLD_SIZE={job.world_size} LOCAL_WORLD_SIZE={job.processes}'
    return fill(_template('node.sh'), {
        'counts': counts, 'node_rank': node_rank, 'master_addr': master_addr, 'master_port': job.port or master_port or DEFAULT_PORT,
        'exports': '\n'.join(f'export {name}={shlex.quote(value)}' for name, value in job.env.items()),
        'enter': f'cd {shlex.quote(job.workdir)}' if job.workdir else '',
        'limit': f'timeout --signal=TERM --kill-after=60 {job.time_s} ' if time_limit and job.time_s else '',
        'script': shlex.quote(job.script), 'arguments': shlex.join([job.yaml, *job.overrides]),
    })  # fmt: skip


def _local(job: LaunchJob) -> str:
    if job.nodes == 1:
        rank, address, usage = '0', '127.0.0.1', '# Run with: bash FILE'
    else:
        rank = '${NODE_RANK:?set it to the rank of this node, 0 to ' + str(job.nodes - 1) + '}'
        address = '${MASTER_ADDR:?set it to an address of node 0}'
        usage = f'# Run on each of the {job.nodes} nodes: NODE_RANK=0 MASTER_ADDR=ADDRESS-OF-NODE-0 bash FILE   (NODE_RANK=1 on the second, ...)'
    return fill(_template('local.sh'), {'command': job.command, 'usage': usage, 'node': node_script(job, rank, address, time_limit=True)})


def _slurm(job: LaunchJob) -> str:
    options = [f'gpus-per-node={job.gpus}'] if job.gpus else []
    options += [f'mem={job.memory}'] if job.memory else []
    options += [f'time={_slurm_time(job.time_s)}'] if job.time_s else []
    options += [f'partition={job.queue}'] if job.queue else []
    # Two jobs may share a node, so the port follows from the job's number unless one is given.
    node = node_script(job, '$SLURM_NODEID', '$JOB_MASTER_ADDR', '$((20000 + SLURM_JOB_ID % 20000))')
    return fill(_template('slurm.sbatch'), {
        'command': job.command, 'name': job.name, 'nodes': job.nodes, 'cpus': job.cpus, 'node': node,
        'options': '\n'.join(f'#SBATCH --{option.removeprefix("--")}' for option in (*options, *job.options)),
    })  # fmt: skip


def _slurm_time(seconds: int) -> str:
    return f'{seconds // 86400}-{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}'


def _k8s(job: LaunchJob) -> str:
    labels = '' if job.queue is None else f'labels:\n  kueue.x-k8s.io/queue-name: {job.queue}'
    values = {'command': job.command, 'name': job.name, 'nodes': job.nodes, 'labels': labels, 'port': job.port or DEFAULT_PORT}
    if job.kind == 'job':
        pod = _pod(job, '$JOB_COMPLETION_INDEX', f'{job.name}-0.{job.name}', 'train')
        deadline = '' if job.time_s is None else f'activeDeadlineSeconds: {job.time_s}'
        return fill(_template('k8s-job.yaml'), {**values, 'pod': pod, 'deadline': deadline, 'retries': 3 * job.nodes})
    # The operator finds its container and port by these names.
    pod = _pod(job, '$RANK', f'{job.name}-master-0', 'pytorch', 'pytorchjob-port')
    policy = 'runPolicy:\n  backoffLimit: 3' + ('' if job.time_s is None else f'\n  activeDeadlineSeconds: {job.time_s}')
    workers = '' if job.nodes == 1 else fill('Worker:\n  replicas: @{n}\n  restartPolicy: OnFailure\n  template:\n    spec:\n      @{pod}', {'n': job.nodes - 1, 'pod': pod})
    return fill(_template('k8s-pytorchjob.yaml'), {**values, 'pod': pod, 'policy': policy, 'workers': workers})


def _pod(job: LaunchJob, node_rank: str, master_addr: str, container: str, port_name: str = 'master') -> str:
    """Containers and volumes of a node's pod."""
    limits = {'nvidia.com/gpu': job.gpus} if job.gpus else {}
    requests = {'cpu': job.cpus, **({'memory': job.memory} if job.memory else {}), **limits}
    resources_text = '\n'.join(f'{kind}: {json.dumps(amounts)}' for kind, amounts in (('requests', requests), ('limits', limits)) if amounts)
    return fill(_template('k8s-pod.yaml'), {
        'container': container, 'image': json.dumps(job.image), 'ports': f'ports:\n- {{name: {port_name}, containerPort: {job.port or DEFAULT_PORT}}}',
        'node': node_script(job, node_rank, master_addr), 'resources': resources_text,
        'mounts': '\n'.join(f'- {{name: volume-{i}, mountPath: {json.dumps(path)}}}' for i, (_, path) in enumerate(job.volumes)),
        'volumes': '\n'.join(f'- {{name: volume-{i}, persistentVolumeClaim: {{claimName: {claim}}}}}' for i, (claim, _) in enumerate(job.volumes)),
    })  # fmt: skip


def _sky(job: LaunchJob) -> str:
    resources_text = [f'accelerators: {json.dumps(f"{job.accelerator}:{job.gpus}")}'] if job.gpus else []
    resources_text += [f'cpus: {job.cpus}+', *([f'memory: {job.memory}+'] if job.memory else [])]
    return fill(_template('skypilot.yaml'), {
        'command': job.command, 'name': job.name, 'nodes': job.nodes, 'resources': '\n'.join(resources_text),
        'setup': "pip install -e '.[gpu]'" if job.gpus else 'pip install -e .',
        'node': node_script(job, '$SKYPILOT_NODE_RANK', '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)', time_limit=True),
    })  # fmt: skip


def _template(name: str) -> str:
    return (resources.files('llmfoundry') / 'assets' / 'launch' / name).read_text(encoding='utf-8')


_SYSTEMS: Mapping[str, Callable[[LaunchJob], str]] = {'local': _local, 'slurm': _slurm, 'k8s': _k8s, 'sky': _sky}
