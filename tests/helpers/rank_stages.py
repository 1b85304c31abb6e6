"""Runs many training configs on 1, 2 and 4 processes, one number of processes after the other, paying the import of torch and Composer once.

A process that has imported everything, and has run nothing, forks the ranks of each stage: they are real processes with gloo between them, and each trains all runs of its stage. As a script it takes
the folder with ``stages.json`` as ``run_stages`` writes it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.helpers.train_runs import run_config, run_script, train_losses

__all__ = ['run_stages']

# Gradients of the first step, whole, as rank 0 has them after they were reduced.
PLUGIN = """
import torch
from composer import Callback
from llmfoundry import dist
from llmfoundry.models.layers.blocks import MPTBlock
from llmfoundry.registry import callbacks, optimizers

class SaveGradients(Callback):
    def __init__(self, path):
        self.path = path

    def after_train_batch(self, state, logger):
        if int(state.timestamp.batch) != 0:
            return
        grads = {}
        for name, p in state.model.named_parameters():
            if p.grad is not None:
                name = name.removeprefix('module.').replace('_checkpoint_wrapped_module.', '')
                grads[name] = p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad.clone()
        if dist.get_global_rank() == 0:
            torch.save(grads, self.path)

# Memory runs out on the last rank as soon as a microbatch has more than ``above`` samples; notes the size that the run took.
class OutOfMemoryOnOneRank(Callback):
    def __init__(self, above, path):
        self.above, self.path, self.whole = above, path, MPTBlock.forward
        if dist.get_global_rank() == dist.get_world_size() - 1:
            MPTBlock.forward = self.forward_with_little_memory()

    def forward_with_little_memory(self):
        def forward(block, x, *args, **kwargs):
            if x.shape[0] > self.above:
                torch.empty(1 << 60)
            return self.whole(block, x, *args, **kwargs)
        return forward

    def fit_end(self, state, logger):
        MPTBlock.forward = self.whole
        with open(f'{self.path}.{dist.get_global_rank()}', 'w') as out:
            out.write(str(state.device_train_microbatch_size))

callbacks.register('save_gradients', func=SaveGradients)
callbacks.register('out_of_memory_on_one_rank', func=OutOfMemoryOnOneRank)
# Plain gradient descent: Adam would hide a gradient that is too large by a factor.
optimizers.register('sgd', func=torch.optim.SGD)
"""


def run_stages(folder: Path, stages: list[dict[str, Any]], timeout: int = 500) -> dict[str, list[float]]:
    """Trains the runs of every stage and returns the losses of each run.

    Args:
        folder: where configs, losses (``NAME.losses.json``), first gradients (``NAME.grads.pt``) and the plug-in are written.
        stages: ``{'ranks': n, 'runs': {name: config}}``; stages run in order, the runs of one in the same processes.
        timeout: seconds for all of them.
    """
    (folder / 'plugin.py').write_text(PLUGIN)
    (folder / 'stages.json').write_text(json.dumps(stages))
    run_script(folder, Path(__file__), folder, ranks=None, timeout=timeout)
    return {name: json.loads((folder / f'{name}.losses.json').read_text()) for stage in stages for name in stage['runs']}


def _rank(rank: int, stage: dict[str, Any], folder: Path, port: int) -> None:
    ranks = str(stage['ranks'])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, NODE_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    for name, config in stage['runs'].items():
        print(f'=== {name}', flush=True)
        losses = train_losses(run_config({**config, 'code_paths': [str(folder / 'plugin.py')]}))
        if rank == 0:
            (folder / f'{name}.losses.json').write_text(json.dumps(losses))


def _run_stage(stage: dict[str, Any], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(stage['ranks']):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    _rank(rank, stage, folder, port)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    # Exit handlers unlink Streaming's shared memory; the gloo group is not destroyed, see tests.helpers.processes.
                    atexit._run_exitfuncs()
                    sys.stdout.flush()
            os._exit(code)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status != 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(f'a rank of {stage["ranks"]} failed')


def main() -> None:
    import llmfoundry.command_utils.train  # noqa: F401  what the ranks would each import

    folder = Path(sys.argv[1])
    for stage in json.loads((folder / 'stages.json').read_text()):
        _run_stage(stage, folder)


if __name__ == '__main__':
    main()
