"""Yardsticks shared by the benchmarks: the machine's matrix-product rate, FLOPs of a training step, peak memory.

Imports torch and the standard library only, so that it runs in any interpreter that has torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any


def _load_rates() -> ModuleType:
    """Our table and measurement, by path: the interpreter may have another package called llmfoundry."""
    path = Path(__file__).resolve().parents[3] / 'llmfoundry' / 'callbacks' / 'device_rates.py'
    spec = importlib.util.spec_from_file_location('device_rates', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_rates = _load_rates()

# Sizes of the published MPT models: width, heads, layers. 'tiny' only tries out the benchmark itself.
MODELS = {
    'tiny': {'d_model': 64, 'n_heads': 2, 'n_layers': 2},
    '125m': {'d_model': 768, 'n_heads': 12, 'n_layers': 12},
    '350m': {'d_model': 1024, 'n_heads': 16, 'n_layers': 24},
    '760m': {'d_model': 1536, 'n_heads': 12, 'n_layers': 24},
    '1b': {'d_model': 2048, 'n_heads': 16, 'n_layers': 24},
    '3b': {'d_model': 2560, 'n_heads': 20, 'n_layers': 32},
    '7b': {'d_model': 4096, 'n_heads': 32, 'n_layers': 32},
}
VOCAB_SIZE = 50368


def model_config(size: str, max_seq_len: int, attn_impl: str) -> dict[str, Any]:
    """Keyword arguments of ``ComposerMPTCausalLM`` that ours and the public release both take."""
    return {**MODELS[size], 'expansion_ratio': 4, 'max_seq_len': max_seq_len, 'vocab_size': VOCAB_SIZE, 'attn_config': {'attn_impl': attn_impl}}


def step_flops(n_params: int, size: str, batch_size: int, seq_len: int) -> float:
    """FLOPs of one forward and backward pass, as the published throughput tables count them.

    6 per parameter (tied embedding and head once) and token; and for attention 12 * layers * d_model * seq_len per token: two products of
    2 * d_model * seq_len in the forward pass, twice that in the backward pass, without a discount for the causal mask.
    """
    shape = MODELS[size]
    tokens = batch_size * seq_len
    return 6.0 * n_params * tokens + 12.0 * shape['n_layers'] * shape['d_model'] * seq_len * tokens


def matmul_rate(size: str, tokens: int, repeats: int = 3) -> float:
    """Best float32 matrix-product rate of this process, in FLOP/s, over the shapes of one step of the model.

    The shapes are those of the projections, the two layers of the feed-forward block, and a chunk of the head.
    """
    d_model = MODELS[size]['d_model']
    shapes = [(tokens, d_model, 3 * d_model), (tokens, d_model, 4 * d_model), (tokens, 4 * d_model, d_model), (min(tokens, 512), d_model, VOCAB_SIZE)]
    return _rates.matmul_rate(shapes, repeats=repeats)


def peak_bf16_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak, or None if the table does not have it."""
    return _rates.peak_flops(device_name, 'amp_bf16')


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    except OSError:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == 'darwin' else peak * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order of the first row."""
    columns = list(rows[0])
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(columns)]
    lines += ['| ' + ' | '.join(str(row.get(column, '')) for column in columns) + ' |' for row in rows]
    return '\n'.join(lines)
