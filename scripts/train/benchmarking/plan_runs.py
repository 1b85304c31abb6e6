"""The runs on which ``llmfoundry plan`` is compared with what training really takes: configs, data, and one process or two."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ['RUNS', 'Run', 'base_config', 'measure_run', 'write_data']

WORKER = Path(__file__).with_name('run_worker.py')
VOCAB_SIZE = 50368
SAMPLES = 64
MPT_125M = {'d_model': 768, 'n_heads': 12, 'n_layers': 12}
LLAMA_100M = {
    'vocab_size': 50304, 'hidden_size': 768, 'intermediate_size': 2048, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'num_key_value_heads': 4, 'max_position_embeddings': 2048,
    'bos_token_id': 1, 'eos_token_id': 2, 'tie_word_embeddings': False,
}
LORA = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 16, 'lora_alpha': 32, 'lora_dropout': 0.05, 'target_modules': ['q_proj', 'k_proj', 'v_proj', 'o_proj']}
SHARDED = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'DEFAULT'}


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        name: what the row says.
        seq_len: tokens per sample.
        microbatch: samples per forward pass.
        microbatches: forward passes per step and process.
        changes: top-level keys of the config that differ from ``base_config``.
        processes: number of ranks.
        llama: whether the model is the Llama of ``LLAMA_100M``, from a folder with its config.
    """

    name: str
    seq_len: int = 1024
    microbatch: int = 1
    microbatches: int = 2
    changes: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    llama: bool = False


def _mpt(**shape: int) -> dict[str, Any]:
    return {'model': shape}


RUNS = (
    Run('MPT-125M fp32'),
    Run('MPT-125M amp_bf16', microbatch=2, changes={'precision': 'amp_bf16'}),
    Run('MPT-125M fp32, recomputing', microbatch=2, changes={'fsdp_config': {'activation_checkpointing': True}}),
    Run('MPT d512 x 6', seq_len=512, microbatch=8, changes=_mpt(d_model=512, n_heads=8, n_layers=6)),
    Run('MPT-125M, 4,096 tokens, amp_bf16', seq_len=4096, microbatches=1, changes={'precision': 'amp_bf16'}),
    Run('Llama 100M fp32', microbatch=2, microbatches=1, llama=True),
    Run('Llama 100M, LoRA', microbatch=4, microbatches=1, changes={'model': {'peft_config': LORA}}, llama=True),
    Run('MPT-125M fp32, 2 x FSDP2', changes={'fsdp_config': SHARDED}, processes=2),
    Run('MPT-125M fp32, 2 x DDP', microbatches=1, processes=2),
)


def base_config(run: Run, folder: Path) -> dict[str, Any]:
    """The training config of ``run``; its data lie in ``folder``."""
    model: dict[str, Any] = {
        'name': 'mpt_causal_lm', **MPT_125M, 'expansion_ratio': 4, 'max_seq_len': run.seq_len, 'vocab_size': VOCAB_SIZE, 'attn_config': {'attn_impl': 'torch'},
    }
    if run.llama:
        model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(folder / 'llama'), 'pretrained': False}
    changes = copy.deepcopy(run.changes)
    model.update(changes.pop('model', {}))
    dataset = {'local': str(folder / f'tokens{run.seq_len}'), 'split': 'train', 'max_seq_len': run.seq_len, 'shuffle': True}
    return {
        'model': model, 'tokenizer': {'name': 'llmfoundry://gpt2'}, 'train_loader': {'name': 'text', 'drop_last': True, 'num_workers': 0, 'dataset': dataset},
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-4}, 'scheduler': {'name': 'constant_with_warmup', 't_warmup': '0ba'}, 'max_duration': '3ba', 'max_seq_len': run.seq_len,
        'global_train_batch_size': run.microbatch * run.microbatches * run.processes, 'device_train_microbatch_size': run.microbatch, 'precision': 'fp32',
        'eval_interval': 0, 'log_to_console': False, 'log_config': False, 'python_log_level': 'warning', **changes,
    }  # fmt: skip


def write_data(folder: Path, seq_len: int) -> None:
    """Random tokens, and the folder of the Llama's config."""
    import numpy as np
    from streaming import MDSWriter

    out = folder / f'tokens{seq_len}' / 'train'
    if not out.exists():
        rng = np.random.default_rng(0)
        with MDSWriter(columns={'tokens': f'ndarray:int32:{seq_len}'}, out=str(out)) as writer:
            for _ in range(SAMPLES):
                writer.write({'tokens': rng.integers(1, 32000, seq_len).astype(np.int32)})
    llama = folder / 'llama'
    llama.mkdir(exist_ok=True)
    (llama / 'config.json').write_text(json.dumps({'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], **LLAMA_100M}))


def measure_run(config: dict[str, Any], processes: int, folder: Path, timeout: float, **environment: str) -> list[dict[str, Any]]:
    """Trains in fresh processes and returns what each rank took, by rank.

    Raises:
        SystemExit: the run failed; its last lines are shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'config.yaml'
    path.write_text(json.dumps(config))
    start = [str(Path(sys.executable).parent / 'composer'), '-n', str(processes)]
    env = {**{k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'WORLD_SIZE')}, 'HF_HUB_OFFLINE': '1', **environment}
    with (folder / 'out.txt').open('w') as out:
        code = subprocess.run([*start, str(WORKER), str(path), str(folder)], cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=timeout, check=False).returncode
    if code:
        sys.exit(f'{path} failed with exit code {code}:\n' + '\n'.join((folder / 'out.txt').read_text().splitlines()[-25:]))
    return [json.loads((folder / f'rank{rank}.json').read_text()) for rank in range(processes)]
