"""Rules between the keys of an MPT ``model`` block, one function each.

They repeat, without torch and all at once, what ``MPTConfig`` would refuse one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmfoundry.config.mpt_block import MPT_SUB_BLOCKS, MPTBlock
from llmfoundry.config.report import Report, nearest
from llmfoundry.config.value_types import show

__all__ = ['check_mpt_rules']


class _Model:
    """The block with its defaults, and a shorthand for reporting."""

    def __init__(self, block: Mapping[str, Any], report: Report) -> None:
        self.block, self.report = block, report

    def __getitem__(self, path: str) -> Any:
        """Value at ``key`` or ``sub.key``: the user's, else the default."""
        head, _, tail = path.partition('.')
        if not tail:
            return self.block.get(head, MPTBlock.model_fields[head].default)
        sub = self.block.get(head)
        default = MPT_SUB_BLOCKS[head].model_fields[tail].default
        return sub.get(tail, default) if isinstance(sub, Mapping) else default

    def add(self, key: str, message: str) -> None:
        self.report.add(('model', *key.split('.')), message)


def _positive_sizes(m: _Model) -> None:
    for key in ('d_model', 'n_heads', 'n_layers', 'max_seq_len', 'vocab_size', 'expansion_ratio', 'norm_eps', 'head_dim', 'ffn_config.ffn_hidden_size', 'final_logit_softcapping',
                'attn_config.attn_logit_softcapping', 'attn_config.clip_qkv', 'attn_config.rope_theta', 'attn_config.kv_dim'):
        if m[key] is not None and m[key] <= 0:
            m.add(key, f'must be positive, got {m[key]}')


def _probabilities(m: _Model) -> None:
    for key in ('resid_pdrop', 'emb_pdrop', 'attn_config.attn_pdrop'):
        if not 0 <= m[key] <= 1:
            m.add(key, f'a probability lies in [0, 1], got {m[key]}')
    if not 0 < m['embedding_fraction'] <= 1:
        m.add('embedding_fraction', f'must lie in (0, 1], got {m["embedding_fraction"]}')


def _heads_divide_width(m: _Model) -> None:
    width, heads = m['d_model'], m['n_heads']
    if heads > 0 and width % heads != 0:
        m.add('d_model', f'must be divisible by n_heads, got d_model {width} and n_heads {heads}')


def _integral_hidden_size(m: _Model) -> None:
    if m['ffn_config.ffn_hidden_size'] is None and not float(m['d_model'] * m['expansion_ratio']).is_integer():
        m.add('expansion_ratio', f'd_model * expansion_ratio must be an integer, got {m["d_model"]} * {m["expansion_ratio"]} = {m["d_model"] * m["expansion_ratio"]}')


def _kv_heads(m: _Model) -> None:
    kv_heads, heads = m['attn_config.kv_n_heads'], m['n_heads']
    if kv_heads is None:
        if m['attn_config.attn_type'] == 'grouped_query_attention':
            m.add('attn_config', 'attn_type grouped_query_attention needs kv_n_heads, the number of key/value heads')
    elif kv_heads <= 0 or kv_heads > heads or heads % kv_heads != 0:
        m.add('attn_config.kv_n_heads', f'must be positive and divide n_heads {heads}, got {kv_heads}')
    elif m['attn_config.attn_type'] in ('multihead_attention', 'multiquery_attention'):
        m.add('attn_config.kv_n_heads', f'only attn_type grouped_query_attention takes it, got attn_type {m["attn_config.attn_type"]!r}')


def _query_key_norms(m: _Model) -> None:
    if m['attn_config.qk_ln'] and m['attn_config.qk_gn']:
        m.add('attn_config.qk_gn', 'qk_ln and qk_gn cannot both be true')


def _no_global_nope(m: _Model) -> None:
    if m['attn_config.nope']:
        m.add('attn_config.nope', 'cannot be set for all layers; set it in block_overrides')


def _rope_types(m: _Model) -> None:
    allowed = {'rope_dail_config': ('original', 'xpos'), 'rope_hf_config': ('no_scaling', 'linear', 'dynamic', 'llama3')}
    for key, types in allowed.items():
        value = m[f'attn_config.{key}'].get('type', types[0])
        if value not in types:
            m.add(f'attn_config.{key}.type', f'expected one of {", ".join(map(repr, types))}, got {show(value)}{_hint(value, types)}')


def _cross_attention(m: _Model) -> None:
    if m['attn_config.kv_dim'] is not None and m['attn_config.fused_qkv']:
        m.add('attn_config.kv_dim', 'needs fused_qkv: false')


def _no_sequence_parallelism(m: _Model) -> None:
    if (m['attn_config.seq_parallel_world_size'] or 1) > 1:
        m.add('attn_config.seq_parallel_world_size', f'sequence parallelism is not supported; use 1, got {m["attn_config.seq_parallel_world_size"]}')


def _sliding_window(m: _Model) -> None:
    size = m['attn_config.sliding_window_size']
    if size != -1 and size <= 0:
        m.add('attn_config.sliding_window_size', f'must be positive, or -1 for no window, got {size}')


def _logit_scale(m: _Model) -> None:
    if isinstance(m['logit_scale'], str) and m['logit_scale'] != 'inv_sqrt_d_model':
        m.add('logit_scale', f"expected a number or 'inv_sqrt_d_model', got {show(m['logit_scale'])}")


def _init_config(m: _Model) -> None:
    if m['init_config.name'] == 'baseline_' and m['init_config.init_std'] is None:
        m.add('init_config', 'baseline_ needs init_std')
    divisor = m['init_config.init_div_is_residual']
    if isinstance(divisor, str) and not divisor.replace('.', '', 1).isdigit():
        m.add('init_config.init_div_is_residual', f'expected true, false or a number, got {show(divisor)}')
    limits = m['init_config.emb_init_uniform_lim']
    if isinstance(limits, list) and len(limits) != 2:
        m.add('init_config.emb_init_uniform_lim', f'expected one number or [low, high], got {len(limits)} numbers')


def _activation(m: _Model) -> None:
    function = m['ffn_config.ffn_act_fn']
    if isinstance(function, Mapping) and 'name' not in function:
        m.add('ffn_config.ffn_act_fn', 'missing key: name (a function of torch.nn.functional)')
    if function is not None and m['ffn_config.ffn_type'] == 'te_ln_mlp':
        m.add('ffn_config.ffn_act_fn', 'ffn_type te_ln_mlp has its own activation; delete the key')


_DMOE_KEYS = ('moe_num_experts', 'moe_top_k', 'mlp_type', 'moe_jitter_eps', 'moe_normalize_expert_weights', 'uniform_expert_assignment')


_DENSE_KEYS = ('ffn_type', 'ffn_hidden_size', 'ffn_act_fn')
_FFN_KEYS = {'mptmlp': _DENSE_KEYS, 'mptglu': _DENSE_KEYS, 'torch_dmoe': (*_DENSE_KEYS, *_DMOE_KEYS)}


def _ffn_keys(m: _Model) -> None:
    """Our own layers take few keys; those of other kinds would be refused when the layer is built."""
    kind = m['ffn_config.ffn_type']
    for key in m.block.get('ffn_config') or {}:
        if kind in _FFN_KEYS and key not in _FFN_KEYS[kind]:
            m.add(f'ffn_config.{key}', f'is not a key of ffn_type {kind}, which takes {", ".join(_FFN_KEYS[kind])}')


def _experts(m: _Model) -> None:
    if m['ffn_config.ffn_type'] == 'torch_dmoe':
        missing = [k for k in _DMOE_KEYS if k not in m.block['ffn_config']]
        if missing:
            m.add('ffn_config', f'ffn_type torch_dmoe needs the keys {", ".join(missing)}')
    experts, top_k = m['ffn_config.moe_num_experts'], m['ffn_config.moe_top_k']
    if experts is not None and top_k is not None and not 0 < top_k <= experts:
        m.add('ffn_config.moe_top_k', f'must lie between 1 and moe_num_experts {experts}, got {top_k}')


def _block_overrides(m: _Model) -> None:
    overrides = m['block_overrides']
    if overrides is None:
        return
    for key in ('order', 'overrides'):
        if key not in overrides:
            m.add('block_overrides', f'missing key: {key}')
    if isinstance(overrides.get('overrides'), Mapping) and 'default' in overrides['overrides']:
        m.add('block_overrides.overrides.default', "'default' names the layers without overrides; choose another name")


_RULES: tuple[Callable[[_Model], None], ...] = (
    _positive_sizes, _probabilities, _heads_divide_width, _integral_hidden_size, _kv_heads, _query_key_norms, _no_global_nope, _rope_types, _cross_attention,
    _no_sequence_parallelism, _sliding_window, _logit_scale, _init_config, _activation, _ffn_keys, _experts, _block_overrides,
)  # fmt: skip


def _hint(value: Any, valid: Any) -> str:
    near = nearest(value, valid) if isinstance(value, str) else None
    return f' (did you mean {near!r}?)' if near else ''


def check_mpt_rules(block: Mapping[str, Any], report: Report) -> None:
    """Applies every rule to a block whose keys and types are already known to be right (see ``Report.pruned``)."""
    model = _Model(block, report)
    for rule in _RULES:
        rule(model)
