"""Composer checkpoints of tiny models, written by a real Trainer, and what their models compute."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch

from llmfoundry.checkpoint.parity import compute_logits, probe_batch
from tests.helpers.tiny_mpt import randomise

__all__ = ['MPT_VARIANTS', 'TrainedRun', 'build_mpt', 'gpt2_tokenizer', 'tiny_hf_gpt2', 'train', 'training_data']

VOCAB_SIZE = 50304
_BASE: dict[str, Any] = {'d_model': 16, 'n_heads': 4, 'n_layers': 2, 'vocab_size': VOCAB_SIZE, 'max_seq_len': 40, 'expansion_ratio': 2, 'init_device': 'cpu'}
_MOE = {
    'ffn_type': 'torch_dmoe', 'moe_num_experts': 4, 'moe_top_k': 2, 'mlp_type': 'glu', 'moe_jitter_eps': 0.1, 'moe_normalize_expert_weights': 1,
    'uniform_expert_assignment': False,
}
MPT_VARIANTS: dict[str, dict[str, Any]] = {
    'alibi': {'no_bias': True, 'attn_config': {'alibi': True, 'attn_impl': 'flash'}},
    'rope_gqa_glu': {
        'no_bias': True, 'norm_type': 'rmsnorm', 'tie_word_embeddings': False, 'ffn_config': {'ffn_type': 'mptglu', 'ffn_act_fn': {'name': 'silu'}},
        'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 2, 'rope': True, 'rope_impl': 'hf', 'rope_theta': 5000},
    },
    'learned_qk_ln': {'logit_scale': 'inv_sqrt_d_model', 'attn_config': {'qk_ln': True, 'clip_qkv': 6, 'fused_qkv': False}},
    'moe': {'ffn_config': _MOE, 'attn_config': {'attn_type': 'multiquery_attention', 'rope': True, 'rope_impl': 'dail'}},
    'block_overrides': {
        'n_layers': 3, 'final_logit_softcapping': 30.0,
        'attn_config': {'rope': True, 'rope_impl': 'hf', 'attn_logit_softcapping': 20.0},
        'block_overrides': {
            'order': [{'name': 'default'}, {'name': 'window'}, {'name': 'reuse'}],
            'overrides': {'window': {'attn_config': {'sliding_window_size': 8}}, 'reuse': {'attn_config': {'sliding_window_size': 8, 'reuse_kv_layer_idx': -1}}},
        },
    },
}


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint and the logits of the very model that was trained, (batch, seq, vocab)."""

    path: Path
    logits: torch.Tensor
    config: dict[str, Any]


def gpt2_tokenizer() -> Any:
    from llmfoundry.tokenizers.build import build_tokenizer

    return build_tokenizer('llmfoundry://gpt2', {})


def build_mpt(tokenizer: Any, seed: int = 0, **kwargs: Any) -> Any:
    """An MPT for Composer with every parameter random."""
    from llmfoundry.models.mpt.composer_mpt import ComposerMPTCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = ComposerMPTCausalLM(tokenizer, use_train_metrics=False, **{**_BASE, **kwargs})
    randomise(model.model, seed)
    return model


def tiny_hf_gpt2(tokenizer: Any) -> Any:
    """transformers' own GPT-2 for Composer, tied."""
    import transformers
    from composer.models import HuggingFaceModel

    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCAB_SIZE, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = HuggingFaceModel(transformers.GPT2LMHeadModel(config), tokenizer=tokenizer, use_logits=True, shift_labels=True)
    randomise(model.model)
    return model


def training_data(seed: int = 0) -> Any:
    """A loader of two batches of four sequences of 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 50257, (16,), generator=generator) for _ in range(8)]

    def collate(batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(list(batch))
        return {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids, dtype=torch.bool)}

    return torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


def train(model: Any, folder: str | os.PathLike, duration: str = '2ba', **trainer_arguments: Any) -> TrainedRun:
    """Trains two batches and saves; returns the checkpoint and the logits of the trained model on the parity probe."""
    from composer import Trainer
    from composer.optim import DecoupledAdamW

    arguments: dict[str, Any] = {'save_folder': os.fspath(folder), 'save_interval': '2ba', **trainer_arguments}
    trainer = Trainer(
        model=model, train_dataloader=training_data(), max_duration=duration, optimizers=DecoupledAdamW(model.parameters(), lr=1e-3), progress_bar=False, **arguments,
    )
    trainer.fit()
    trainer.close()
    hf_model = model.model.eval()
    return TrainedRun(Path(folder) / 'latest-rank0.pt', compute_logits(hf_model, probe_batch(VOCAB_SIZE, 40)), hf_model.config.to_dict())
