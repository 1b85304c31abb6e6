"""The configuration of MPT models: every key, its default, and the rules between keys.

A plain ``PretrainedConfig``, so that exported folders load with ``transformers`` alone. Partial nested dicts are completed from the defaults below, and all rules
are checked at construction, before any tensor exists. No torch work happens here: what depends on an installed package (flash-attn,
TransformerEngine) is decided where the layer is built.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any, Mapping

from transformers import PretrainedConfig

from llmfoundry.models.mpt.block_overrides import resolve_block_overrides

__all__ = ['MPTConfig', 'attn_config_defaults', 'fc_type_defaults', 'ffn_config_defaults', 'init_config_defaults']

log = logging.getLogger(__name__)

attn_config_defaults: dict[str, Any] = {
    'attn_type': 'multihead_attention',
    'attn_pdrop': 0.0,
    'attn_impl': 'flash',
    'qk_ln': False,
    'qk_gn': False,
    'fused_qkv': True,
    'clip_qkv': None,
    'softmax_scale': None,
    'attn_uses_sequence_id': False,
    'sliding_window_size': -1,
    'attn_logit_softcapping': None,
    'alibi': False,
    'alibi_bias_max': 8,
    'rope': False,
    'rope_theta': 10000,
    'rope_impl': 'dail',
    'rope_dail_config': {'type': 'original', 'pos_idx_in_fp32': True, 'xpos_scale_base': 512},
    'rope_hf_config': {'type': 'no_scaling', 'factor': 1.0},
    'nope': False,
    'attn_temperature_tuning': {'floor_scale': 8192, 'attn_scale': 0.0},
    'kv_dim': None,
}
ffn_config_defaults: dict[str, Any] = {'ffn_type': 'mptmlp'}
init_config_defaults: dict[str, Any] = {
    'name': 'kaiming_normal_',
    'fan_mode': 'fan_in',
    'init_nonlinearity': 'relu',
    'init_div_is_residual': True,
    'emb_init_std': None,
    'emb_init_uniform_lim': None,
    'init_std': None,
    'init_gain': 0.0,
}
fc_type_defaults: dict[str, Any] = {'name': 'torch'}

_ROPE_DAIL_TYPES = ('original', 'xpos')
_ROPE_HF_TYPES = ('no_scaling', 'linear', 'dynamic', 'llama3')


class MPTConfig(PretrainedConfig):
    """Configuration of ``MPTModel`` and ``MPTForCausalLM``.

    Args:
        d_model: width of the residual stream, in features.
        n_heads: query heads; must divide ``d_model``.
        n_layers: number of blocks.
        head_dim: features per head; None means ``d_model / n_heads``. The default softmax scale stays that of ``d_model / n_heads``, as in published models.
        expansion_ratio: hidden size of the feed-forward block over ``d_model``; the product must be an integer.
        max_seq_len: longest sequence, in tokens.
        vocab_size: rows of the token embedding.
        resid_pdrop: dropout probability of both residual branches.
        emb_pdrop: dropout probability after the embedding.
        learned_pos_emb: learned positions; switched off when alibi or rope is on.
        attn_config: see ``attn_config_defaults``.
        ffn_config: ``ffn_type`` and that block's arguments.
        init_device: where parameters are created: ``cpu``, ``meta``, ``cuda`` or ``mixed``.
        logit_scale: factor on the logits, or ``inv_sqrt_d_model``.
        no_bias: no module has a bias.
        attention_bias: overrides ``no_bias`` for the query, key and value projections.
        embedding_fraction: share of the gradient that reaches the embedding, in (0, 1].
        norm_type: name in the registry ``norms``.
        norm_eps: epsilon of the norms.
        use_cache: return keys and values for generation.
        init_config: ``name`` in the registry ``param_init_fns`` and its arguments.
        fc_type: name in the registry ``fcs``, or a dict with ``name`` and arguments.
        tie_word_embeddings: the output head shares the token embedding's weight.
        use_pad_tok_in_ffn: False drops padding tokens before the feed-forward block.
        block_overrides: layers that differ, see ``block_overrides.py``.
        final_logit_softcapping: c in ``c * tanh(logits / c)``.
        **kwargs: keys of ``PretrainedConfig`` and any others, which are kept as attributes.

    Raises:
        ValueError: a rule is broken; the text has the key, the value, the rule and the remedy.
        KeyError: ``block_overrides`` sets a key that cannot differ between layers.
    """

    model_type = 'mpt'
    attribute_map = {'num_attention_heads': 'n_heads', 'hidden_size': 'd_model', 'num_hidden_layers': 'n_layers'}

    def __init__(
        self,
        d_model: int = 2048,
        n_heads: int = 16,
        n_layers: int = 24,
        head_dim: int | None = None,
        expansion_ratio: int | float = 4,
        max_seq_len: int = 2048,
        vocab_size: int = 50368,
        resid_pdrop: float = 0.0,
        emb_pdrop: float = 0.0,
        learned_pos_emb: bool = True,
        attn_config: dict[str, Any] | None = None,
        ffn_config: dict[str, Any] | None = None,
        init_device: str = 'cpu',
        logit_scale: float | str | None = None,
        no_bias: bool = False,
        attention_bias: bool | None = None,
        embedding_fraction: float = 1.0,
        norm_type: str = 'low_precision_layernorm',
        norm_eps: float = 1e-5,
        use_cache: bool = False,
        init_config: dict[str, Any] | None = None,
        fc_type: str | dict[str, Any] = 'torch',
        tie_word_embeddings: bool = True,
        use_pad_tok_in_ffn: bool = True,
        block_overrides: dict[str, Any] | None = None,
        final_logit_softcapping: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Completes the nested dicts and checks every rule; arguments are described in the class docstring."""
        self.d_model, self.n_heads, self.n_layers, self.head_dim = d_model, n_heads, n_layers, head_dim
        self.expansion_ratio = expansion_ratio
        self.max_seq_len = _integral('max_seq_len', max_seq_len)
        self.vocab_size = vocab_size
        self.resid_pdrop, self.emb_pdrop = resid_pdrop, emb_pdrop
        self.learned_pos_emb = learned_pos_emb
        self.init_device = init_device
        self.logit_scale, self.final_logit_softcapping = logit_scale, final_logit_softcapping
        self.no_bias, self.attention_bias = no_bias, attention_bias
        self.embedding_fraction = embedding_fraction
        self.norm_type, self.norm_eps = norm_type, norm_eps
        self.use_pad_tok_in_ffn = use_pad_tok_in_ffn
        self.attn_config = _complete(_without_removed_keys(attn_config), attn_config_defaults, 'attn_config')
        self.ffn_config = _complete(ffn_config, ffn_config_defaults, 'ffn_config')
        self.init_config = _init_config(init_config)
        self.fc_type = _complete({'name': fc_type} if isinstance(fc_type, str) else fc_type, {} if isinstance(fc_type, Mapping) else fc_type_defaults, 'fc_type')
        self.block_overrides = None if block_overrides is None else copy.deepcopy(_plain(block_overrides))
        # Keys of the Composer wrapper, present in some published folders.
        for key in ('name', 'loss_fn'):
            kwargs.pop(key, None)
        _settle_positions(self)
        validate_mpt_config(self)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        # Set after the parent's constructor, since transformers 5 keeps only what it knows of among its arguments.
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def layer_attn_configs(self) -> list[dict[str, Any]]:
        """``attn_config`` of each layer, after ``block_overrides``; see ``resolve_block_overrides``."""
        if self.block_overrides is None:
            return [self.attn_config] * self.n_layers
        return resolve_block_overrides(self.block_overrides, self.n_layers, self.attn_config)


def validate_mpt_config(config: MPTConfig) -> None:
    """Checks every value's kind and every rule between the keys. Called by the constructor; call it again after changing attributes by hand.

    Raises:
        ValueError: a rule is broken.
        NotImplementedError: a known but unsupported choice.
        KeyError: see ``resolve_block_overrides``.
    """
    _check_kinds(config)
    _check_sizes(config)
    _check_attention(config)
    _check_rope(config.attn_config)
    _check_ffn_and_fc(config)
    _check_layers(config)


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, so that the config can be written as JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or type(value).__name__ == 'ListConfig':
        return [_plain(item) for item in value]
    return value


def _complete(given: Mapping[str, Any] | None, defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    """``given`` with missing keys filled from ``defaults``, recursively. Neither argument is changed; ``path`` is its key in errors."""
    completed = copy.deepcopy(_plain(given or {}))
    if not isinstance(completed, dict):
        raise ValueError(f'{path} must be a mapping of settings, got {given!r}')
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(completed.get(key), dict):
            completed[key] = _complete(completed[key], default, f'{path}.{key}')
        elif isinstance(default, dict) and completed.get(key) is not None:
            raise ValueError(f'{path}.{key} must be a mapping of settings, got {completed[key]!r}')
        elif key not in completed or (isinstance(default, dict) and completed[key] is None):
            completed[key] = copy.deepcopy(default)
    return completed


def _without_removed_keys(attn_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Drops the keys that released folders still carry and that no longer mean anything."""
    if attn_config is not None and not isinstance(attn_config, Mapping) and type(attn_config).__name__ != 'DictConfig':
        raise ValueError(f'attn_config must be a mapping of settings, got {attn_config!r}')
    attn = dict(attn_config or {})
    if attn.pop('prefix_lm', False):
        raise ValueError('attn_config.prefix_lm is true, but prefix language models are no longer supported; set it to false or remove it')
    if attn.get('seq_parallel_world_size', 1) is None:
        del attn['seq_parallel_world_size']
    return attn


def _init_config(given: Mapping[str, Any] | None) -> dict[str, Any]:
    completed = _complete(given, init_config_defaults, 'init_config')
    if not completed.get('name'):
        raise ValueError(f'init_config.name must name an initialisation function such as kaiming_normal_, got {completed.get("name")!r}')
    return completed


def _integral(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value:
        raise ValueError(f'{key} must be an integer, got {value!r}')
    return int(value)


def _settle_positions(config: MPTConfig) -> None:
    attn = config.attn_config
    used = [name for name in ('alibi', 'rope') if attn[name]]
    if used and config.learned_pos_emb:
        warnings.warn(f'learned_pos_emb is set to False, since attn_config.{used[0]} is true.', stacklevel=3)
        config.learned_pos_emb = False
    if not used and not config.learned_pos_emb:
        warnings.warn('No positional information is used: alibi, rope and learned_pos_emb are all off.', stacklevel=3)


def _check_kinds(config: MPTConfig) -> None:
    """Numbers are numbers and names are names, so that no rule below compares a text with a number."""
    attn, ffn = config.attn_config, config.ffn_config
    for key in ('d_model', 'n_heads', 'n_layers', 'vocab_size'):
        setattr(config, key, _integral(key, getattr(config, key)))
        if getattr(config, key) <= 0:
            raise ValueError(f'{key} must be above 0, got {getattr(config, key)}')
    for key in ('kv_n_heads', 'kv_dim', 'sliding_window_size', 'seq_parallel_world_size'):
        if attn.get(key) is not None:
            attn[key] = _integral(f'attn_config.{key}', attn[key])
    numbers = {
        'expansion_ratio': config.expansion_ratio, 'resid_pdrop': config.resid_pdrop, 'emb_pdrop': config.emb_pdrop, 'embedding_fraction': config.embedding_fraction,
        'norm_eps': config.norm_eps, 'attn_config.attn_pdrop': attn['attn_pdrop'],
    }
    optional = {
        'head_dim': config.head_dim, 'final_logit_softcapping': config.final_logit_softcapping, 'attn_config.attn_logit_softcapping': attn['attn_logit_softcapping'],
        'attn_config.clip_qkv': attn['clip_qkv'], 'attn_config.softmax_scale': attn['softmax_scale'],
    }
    for key, value in (*numbers.items(), *((k, v) for k, v in optional.items() if v is not None)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f'{key} must be a number, got {value!r}')
    for key, value in (('ffn_config.ffn_type', ffn['ffn_type']), ('norm_type', config.norm_type), ('attn_config.attn_type', attn['attn_type'])):
        if not isinstance(value, str):
            raise ValueError(f'{key} must be a name, got {value!r}')
    hidden = ffn.get('ffn_hidden_size')
    if hidden is not None:
        ffn['ffn_hidden_size'] = _integral('ffn_config.ffn_hidden_size', hidden)
    act = ffn.get('ffn_act_fn')
    if act is not None and not (isinstance(act, Mapping) and isinstance(act.get('name'), str)):
        raise ValueError(f'ffn_config.ffn_act_fn must be a mapping with the key name, such as {{name: silu}}, got {act!r}')


def _check_sizes(config: MPTConfig) -> None:
    if config.d_model % config.n_heads:
        raise ValueError(f'd_model must be divisible by n_heads, got d_model {config.d_model} and n_heads {config.n_heads}')
    if float(config.d_model * config.expansion_ratio) % 1:
        raise ValueError(
            f'd_model * expansion_ratio must be an integer, got {config.d_model} * {config.expansion_ratio} = {config.d_model * config.expansion_ratio}'
        )
    for key, value in (
        ('attn_config.attn_pdrop', config.attn_config['attn_pdrop']),
        ('resid_pdrop', config.resid_pdrop),
        ('emb_pdrop', config.emb_pdrop),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f'{key} is a probability and must be between 0 and 1, got {value}')
    if not 0 < config.embedding_fraction <= 1:
        raise ValueError(f'embedding_fraction must be above 0 and at most 1, got {config.embedding_fraction}')
    if isinstance(config.logit_scale, str) and config.logit_scale != 'inv_sqrt_d_model':
        raise ValueError(f"logit_scale must be a number or 'inv_sqrt_d_model', got {config.logit_scale!r}")


def _check_attention(config: MPTConfig) -> None:
    attn = config.attn_config
    if attn['attn_impl'] not in ('torch', 'flash'):
        hint = ' (triton was removed; flash takes its place)' if attn['attn_impl'] == 'triton' else ''
        raise ValueError(f'attn_config.attn_impl must be torch or flash, got {attn["attn_impl"]!r}{hint}')
    if attn['qk_ln'] and attn['qk_gn']:
        raise ValueError('attn_config.qk_ln and attn_config.qk_gn cannot both be true; choose one')
    if attn['attn_logit_softcapping'] is not None and attn['attn_logit_softcapping'] <= 0:
        raise ValueError(f'attn_config.attn_logit_softcapping must be above 0 or null, got {attn["attn_logit_softcapping"]}')
    if attn['kv_dim'] is not None and attn['fused_qkv']:
        raise ValueError(
            f'attn_config.kv_dim is {attn["kv_dim"]}, which needs attn_config.fused_qkv: false, since keys and values have another input'
        )
    if attn['attn_type'] == 'grouped_query_attention':
        _check_kv_heads(attn.get('kv_n_heads'), config.n_heads)
    if attn.get('seq_parallel_world_size', 1) > 1:
        raise NotImplementedError(
            f'attn_config.seq_parallel_world_size is {attn["seq_parallel_world_size"]}; sequence parallelism is not supported, set it to 1'
        )
    attn.pop('seq_parallel_world_size', None)


def _check_kv_heads(kv_n_heads: int | None, n_heads: int) -> None:
    if kv_n_heads is None:
        raise ValueError('attn_config.kv_n_heads must be given when attn_config.attn_type is grouped_query_attention')
    if kv_n_heads <= 0 or kv_n_heads > n_heads or n_heads % kv_n_heads:
        raise ValueError(
            f'attn_config.kv_n_heads must be between 1 and n_heads and divide n_heads, got kv_n_heads {kv_n_heads} and n_heads {n_heads}'
        )


def _check_rope(attn: dict[str, Any]) -> None:
    if not attn['rope']:
        return
    if attn['rope_impl'] not in ('dail', 'hf'):
        raise ValueError(f'attn_config.rope_impl must be dail or hf, got {attn["rope_impl"]!r}')
    dail_type, hf_type = attn['rope_dail_config']['type'], attn['rope_hf_config']['type']
    if attn['rope_impl'] == 'dail' and dail_type not in _ROPE_DAIL_TYPES:
        raise ValueError(f'attn_config.rope_dail_config.type must be one of {", ".join(_ROPE_DAIL_TYPES)}, got {dail_type!r}')
    if attn['rope_impl'] == 'hf' and hf_type not in _ROPE_HF_TYPES:
        raise ValueError(f'attn_config.rope_hf_config.type must be one of {", ".join(_ROPE_HF_TYPES)}, got {hf_type!r}')


def _check_ffn_and_fc(config: MPTConfig) -> None:
    ffn_type = config.ffn_config['ffn_type']
    if ffn_type == 'mptgeglu':
        raise ValueError("ffn_config.ffn_type 'mptgeglu' was renamed: use 'mptglu' (its default activation is gelu)")
    if ffn_type == 'te_ln_mlp' and config.ffn_config.get('ffn_act_fn') is not None:
        raise ValueError('ffn_config.ffn_act_fn cannot be set with ffn_config.ffn_type te_ln_mlp, which has its own activation')
    if 'name' not in config.fc_type:
        raise ValueError(f'fc_type must be a name or a dict with the key name, got {config.fc_type!r}')


def _check_layers(config: MPTConfig) -> None:
    attn = config.attn_config
    if attn['nope']:
        raise ValueError('attn_config.nope cannot be true for the whole model; set it for some layers through block_overrides')
    if config.block_overrides is None:
        return
    warnings.warn('block_overrides is experimental and may change.', stacklevel=4)
    if any(layer['nope'] for layer in config.layer_attn_configs):
        if config.learned_pos_emb:
            raise ValueError('block_overrides sets nope, but learned_pos_emb is true and adds positions to every layer; set learned_pos_emb: false')
        if attn['alibi'] and attn['attn_impl'] == 'torch':
            raise ValueError(
                'block_overrides sets nope with alibi under attn_impl torch, where all layers share one bias; set attn_config.attn_impl: flash'
            )
