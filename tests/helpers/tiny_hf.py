"""Folders with the config (and weights) of tiny transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ['ARCHITECTURES', 'save_config', 'save_model']

_KW: dict[str, Any] = {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32, 'bos_token_id': 1, 'eos_token_id': 1}
# Name -> config class and arguments. Gemma 2 caps its logits, Granite divides and Cohere multiplies them, Phi's head has a bias.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('LlamaConfig', {**_KW, 'num_key_value_heads': 1}),
    'gpt2': ('GPT2Config', {
        'vocab_size': 67, 'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0, 'n_positions': 64, 'bos_token_id': 1, 'eos_token_id': 1,
    }),
    'gpt_neox': ('GPTNeoXConfig', _KW),
    'opt': ('OPTConfig', {
        'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'ffn_dim': 32, 'word_embed_proj_dim': 16, 'dropout': 0.0, 'bos_token_id': 1, 'eos_token_id': 1,
    }),
    'phi': ('PhiConfig', _KW),
    'gemma2': ('Gemma2Config', {**_KW, 'head_dim': 8, 'num_key_value_heads': 1, 'final_logit_softcapping': 2.0}),
    'granite': ('GraniteConfig', {**_KW, 'logits_scaling': 4.0}),
    'cohere': ('CohereConfig', {**_KW, 'logit_scale': 0.3}),
    'qwen2': ('Qwen2Config', {**_KW, 'num_key_value_heads': 1}),
    'qwen3': ('Qwen3Config', {**_KW, 'head_dim': 8, 'num_key_value_heads': 1}),
    'mistral': ('MistralConfig', {**_KW, 'num_key_value_heads': 1, 'sliding_window': 3}),
    'gemma': ('GemmaConfig', {**_KW, 'head_dim': 8, 'num_key_value_heads': 1}),
    'gemma3': ('Gemma3TextConfig', {**_KW, 'head_dim': 8, 'num_key_value_heads': 1, 'sliding_window': 3, 'layer_types': ['sliding_attention', 'full_attention']}),
    'gpt_oss': ('GptOssConfig', {
        **_KW, 'head_dim': 8, 'num_key_value_heads': 1, 'num_local_experts': 2, 'num_experts_per_tok': 1, 'sliding_window': 3, 'layer_types': ['sliding_attention', 'full_attention'],
    }),
    'falcon': ('FalconConfig', {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'alibi': False, 'bos_token_id': 1, 'eos_token_id': 1}),
    'mamba': ('MambaConfig', {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'state_size': 4}),
    'mixtral': ('MixtralConfig', {**_KW, 'num_key_value_heads': 1, 'num_local_experts': 2}),
}


def save_config(folder: Path, architecture: str, **changes: Any) -> str:
    """Writes ``config.json`` and returns the folder's path."""
    import transformers

    class_name, kwargs = ARCHITECTURES[architecture]
    getattr(transformers, class_name)(**{**kwargs, **changes}).save_pretrained(folder)
    return str(folder)


def save_model(folder: Path, architecture: str, **changes: Any) -> str:
    """Writes config and random weights (safetensors) and returns the folder's path."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(save_config(folder, architecture, **changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)
