"""Speed and memory on the CPU, tokens per expert, loss by context length, the environment, and what needs a GPU or a platform that is not there."""

from __future__ import annotations

import subprocess
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.callbacks import device_rates
from llmfoundry.callbacks.async_eval_callback import AsyncEval
from llmfoundry.callbacks.env_logging_callback import EnvironmentLoggingCallback, environment_data
from llmfoundry.callbacks.loss_perp_v_len_callback import LossPerpVLen, context_lengths, losses_by_context
from llmfoundry.callbacks.memory_monitor import MemoryMonitor, host_memory_stats
from llmfoundry.callbacks.moe_tokens_per_expert_callback import MoETokensPerExpert
from llmfoundry.callbacks.total_loss import total_loss
from llmfoundry.errors import ConfigError
from tests.helpers.train_runs import make_data, metrics_of, run_config, tiny_config

pytestmark = pytest.mark.filterwarnings('ignore::llmfoundry.experimental.ExperimentalWarning')
EXPERTS, TOP_K, LAYERS, TOKENS = 4, 2, 2, 8 * 16


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    """One run with experts and checkpointed activations, bf16, and its warnings."""
    folder = tmp_path_factory.mktemp('monitors')
    config = tiny_config(make_data(folder / 'data'), precision='amp_bf16', max_duration='4ba', fsdp_config={'activation_checkpointing': True})
    experts = {'moe_num_experts': EXPERTS, 'moe_top_k': TOP_K, 'mlp_type': 'mlp', 'moe_jitter_eps': None, 'moe_normalize_expert_weights': 1, 'uniform_expert_assignment': False}
    config['model'] |= {'n_layers': LAYERS, 'ffn_config': {'ffn_type': 'torch_dmoe', **experts}}
    config['callbacks'] = {
        'speed_monitor': {'window_size': 2, 'time_unit': 'seconds'},
        'memory_monitor': {'dist_aggregate_batch_interval': 2},
        'mbmoe_tok_per_expert': {'log_interval': 2, 'log_every_layer': True, 'normalize': False, 'all_reduce_stats': True},
        'env_logging': {'workspace_dir': str(folder), 'packages_to_log': ['torch', 'not-there'], 'log_system': True, 'log_gpu': True, 'log_distributed': True},
        'memory_snapshot': {'folder': str(folder / 'traces')}, 'oom_observer': {},
    }  # fmt: skip
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        trainer = run_config(config)
    return trainer, [str(w.message) for w in seen]


def test_utilisation_is_logged_on_the_cpu(run: Any) -> None:
    trainer, _ = run
    mfu, rate = metrics_of(trainer, 'throughput/device/mfu'), metrics_of(trainer, 'throughput/device/flops_per_sec')
    monitor = next(c for c in trainer.state.callbacks if type(c).__name__ == 'SpeedMonitor')
    assert len(mfu) == 2 and 0 < mfu[0] < 1
    assert mfu == pytest.approx([r / monitor.gpu_flops_available for r in rate])
    for key in ('throughput/batches_per_sec', 'throughput/device/samples_per_sec', 'throughput/device/tokens_per_sec', 'time/train', 'time/val', 'time/total'):
        assert metrics_of(trainer, key), key


def test_host_memory_is_logged(run: Any) -> None:
    trainer, _ = run
    current, peak = metrics_of(trainer, 'memory/current_rss_mem'), metrics_of(trainer, 'memory/peak_rss_mem')
    assert len(current) == 4 and 0.1 < current[-1] < peak[-1] * 1.01 and metrics_of(trainer, 'memory/host_available_mem')[0] > 0.1
    assert len(metrics_of(trainer, 'memory/current_rss_mem_max')) == 2, 'at every second batch'


def test_peak_stays_when_memory_is_given_back() -> None:
    before = host_memory_stats()['rss_bytes.peak']
    block = torch.ones(300_000_000, dtype=torch.uint8)
    del block
    after = host_memory_stats()
    assert after['rss_bytes.peak'] - min(before, after['rss_bytes.current']) > 200e6


def test_memory_keys_choose_and_rename(recwarn: pytest.WarningsRecorder) -> None:
    logged: dict[str, float] = {}
    logger = types.SimpleNamespace(log_metrics=logged.update)
    state = types.SimpleNamespace(model=torch.nn.Linear(1, 1), timestamp=types.SimpleNamespace(batch=1))
    monitor = MemoryMonitor({'rss_bytes.current': 'mine', 'allocated_bytes.all.current': 'gpu'})
    monitor.init(state, logger)
    monitor.after_train_batch(state, logger)
    assert list(logged) == ['memory/mine'] and 'has no allocated_bytes.all.current; it has rss_bytes.current' in str(recwarn.pop().message)


def test_gpu_only_callbacks_say_so_once(run: Any) -> None:
    for text in ('The memory snapshot only works on CUDA', 'OOMObserver only works on CUDA'):
        assert sum(text in message for message in run[1]) == 1


def test_tokens_per_expert(run: Any) -> None:
    """Every token goes to two experts, in each layer; recomputed activations count once."""
    trainer, _ = run
    assert metrics_of(trainer, 'mb_moe/all_layers/mean_tokens_per_expert') == [TOKENS * TOP_K / EXPERTS] * 2
    for layer in range(LAYERS):
        assert sum(metrics_of(trainer, f'mb_moe/layer{layer}/expert{expert}_tokens')[0] for expert in range(EXPERTS)) == TOKENS * TOP_K
    low, high = (metrics_of(trainer, f'mb_moe/all_layers/{end}_tokens_per_expert')[0] for end in ('min', 'max'))
    assert low < TOKENS * TOP_K / EXPERTS < high


def test_tokens_per_expert_needs_experts() -> None:
    with pytest.raises(ValueError, match='the model has no mixture of experts'):
        MoETokensPerExpert().fit_start(types.SimpleNamespace(model=torch.nn.Linear(1, 1)), None)


def test_the_environment_is_a_hyperparameter(run: Any) -> None:
    memory = next(d for d in run[0].logger.destinations if type(d).__name__ == 'InMemoryLogger')
    data = memory.hyperparameters['environment_data']
    assert set(data) == {'git', 'nvidia', 'docker', 'packages', 'system', 'gpu', 'distributed'}
    assert data['packages'] == {'torch': torch.__version__.partition('+')[0]} and data['distributed']['world_size'] == 1


def test_repositories_of_the_workspace(tmp_path: Path) -> None:
    repository = tmp_path / 'project'
    git = ['git', '-C', str(repository), '-c', 'user.name=a', '-c', 'user.email=a@b']
    subprocess.run(['git', 'init', '-q', '-b', 'trunk', str(repository)], check=True)
    (repository / 'f').write_text('1')
    subprocess.run([*git, 'add', 'f'], check=True)
    subprocess.run([*git, 'commit', '-q', '-m', 'm'], check=True)
    subprocess.run([*git, 'remote', 'add', 'origin', 'https://user:secret@example.com/project'], check=True)
    (repository / 'f').write_text('2')
    found = environment_data(['git'], str(tmp_path), ())['git']['project']
    assert (found['branch'], found['remote'], found['changed_files'], len(found['commit'])) == ('trunk', 'example.com/project', 1, 40)


def test_a_workspace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workspace_dir: there is no folder '.*missing'. Set it to the folder .* or log_git: false"):
        EnvironmentLoggingCallback(str(tmp_path / 'missing')).fit_start(None, None)


def test_async_eval_says_what_to_do_instead() -> None:
    with pytest.raises(ConfigError, match="MosaicML platform, .* give eval_loader .* set eval_interval to '2ba'"):
        AsyncEval({'eval_interval': 1}, '2ba', {})


class _Bigrams:
    """A model whose logits for a token are a fixed row."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert 'labels' not in batch
        return {'logits': self.table[batch['input_ids']]}


def test_losses_by_context_are_those_of_each_document() -> None:
    torch.manual_seed(0)
    table, documents = torch.randn(7, 7), [torch.randint(7, (n,)) for n in (5, 3, 8)]
    rows = [torch.cat(documents[:2]), documents[2]]
    labels = torch.stack(rows).clone()
    labels[0, 5] = -100  # the first token of a document is nobody's target
    batch = {'input_ids': torch.stack(rows), 'labels': labels, 'sequence_id': torch.tensor([[0] * 5 + [1] * 3, [0] * 8])}
    sums = losses_by_context(_Bigrams(table), batch, -100)
    wanted = torch.zeros(2, 8, dtype=torch.float64)
    for document in documents:
        losses = F.cross_entropy(table[document[:-1]], document[1:], reduction='none').double()
        wanted[0, : len(losses)] += losses
        wanted[1, : len(losses)] += 1
    assert torch.allclose(sums, wanted)
    assert context_lengths(torch.zeros(1, 3), None).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(('log', 'compute'), [(5, 6), (5, 0)])
def test_a_table_without_a_pass_is_refused(log: int, compute: int) -> None:
    with pytest.raises(ValueError, match=rf'must lie in 1..log_batch_interval=5, got {compute}'):
        LossPerpVLen(log, compute)


@pytest.mark.parametrize(
    ('name', 'precision', 'tf32', 'peak'),
    [
        ('NVIDIA H200', 'amp_bf16', True, 989.5e12), ('NVIDIA GB200', 'amp_fp8', True, 5e15), ('NVIDIA B200', 'amp_bf16', True, 2.25e15), ('NVIDIA A10G', 'amp_fp16', True, 70e12),
        ('AMD Instinct MI300X', 'amp_bf16', False, 1.3074e15), ('NVIDIA H100 80GB HBM3', 'fp32', False, 67e12), ('NVIDIA H100 80GB HBM3', 'fp32', True, 494.5e12),
        ('NVIDIA A100-SXM4-80GB', 'amp_fp8', True, None), ('Some Device', 'amp_bf16', True, None),
    ],
)  # fmt: skip
def test_peaks_by_device_and_precision(name: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert device_rates.peak_flops(name, precision, tf32) == peak


def test_the_total_of_a_loss() -> None:
    one, two = torch.tensor([1.0, 3.0]), torch.tensor(5.0)
    assert [float(total_loss(x)) for x in (one, [one, two], {'a': one, 'b': two}, {'total': two, 'a': one})] == [2, 7, 7, 5]
