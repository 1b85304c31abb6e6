"""The packing self-test passes models that keep documents apart and stops each kind that does not."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.data.checks.packing_self_test import packing_self_test
from llmfoundry.errors import PackingSelfTestError
from llmfoundry.models import composer_base
from llmfoundry.models.cpu_autocast import wrap_forward
from llmfoundry.models.hf import document_attention, packing
from llmfoundry.models.hf.packing import PackingRoute
from llmfoundry.models.mpt.composer_mpt import ComposerMPTCausalLM
from tests.helpers.tiny_hf import save_config

VOCAB = 67


def build(folder: Path, architecture: str, attn_implementation: str | None = None, precision: str = 'fp32', **kwargs: Any) -> Any:
    """A newly initialised model: nothing is easier to get past a test than losses that are all ln(vocabulary)."""
    from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM

    torch.manual_seed(0)
    model = ComposerHFCausalLM(None, save_config(folder, architecture), pretrained=False, attn_implementation=attn_implementation, **kwargs)
    return wrap_forward(model) if precision == 'amp_bf16' else model


def mpt(**attn_config: Any) -> ComposerMPTCausalLM:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return ComposerMPTCausalLM(None, d_model=16, n_heads=2, n_layers=2, vocab_size=VOCAB, max_seq_len=128, attn_config=attn_config)


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('attn_implementation', ['sdpa', 'eager'])
@pytest.mark.parametrize('architecture', ['llama', 'gpt2', 'gpt_neox', 'opt', 'mistral', 'mixtral'])
def test_passes(architecture: str, attn_implementation: str, precision: str, tmp_path: Path) -> None:
    model = build(tmp_path, architecture, attn_implementation, precision).train()
    model.model.get_input_embeddings().training = False
    state, begin = torch.get_rng_state(), time.perf_counter()
    report = packing_self_test(model, VOCAB, 512, 'cpu')
    assert time.perf_counter() - begin < 5 and report.documents == 5 and report.tokens > 100
    assert report.leak == 0 and report.deviation < (1e-5 if precision == 'fp32' else 5e-2) and report.loss_difference < (1e-5 if precision == 'fp32' else 1e-2)
    assert f'(attention {attn_implementation})' in report.backend and 'passed' in str(report)
    # It leaves no trace: modes, gradients, random numbers.
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert [m for m in model.modules() if not m.training] == [model.model.get_input_embeddings()]


@pytest.mark.parametrize('attn_config', [{'attn_uses_sequence_id': True}, {'attn_uses_sequence_id': True, 'alibi': True}, {'attn_uses_sequence_id': True, 'attn_impl': 'torch'}])
def test_passes_mpt(attn_config: dict[str, Any]) -> None:
    assert packing_self_test(mpt(**attn_config), VOCAB, 128, 'cpu').leak == 0


def test_mpt_whose_config_lets_documents_see_each_other() -> None:
    with pytest.raises(PackingSelfTestError, match=r'MPTForCausalLM \(attn_impl torch\): a document changes .* documents see each other.*attn_uses_sequence_id: true'):
        packing_self_test(mpt(attn_uses_sequence_id=False, attn_impl='torch'), VOCAB, 128, 'cpu')


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('architecture', ['llama', 'gpt2', 'gpt_neox', 'opt'])
def test_a_mask_that_is_ignored(architecture: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, '_mask_arguments', lambda *args: {})
    with pytest.raises(PackingSelfTestError, match=r'\(attention sdpa\): a document changes by .* documents see each other.*attn_implementation: eager'):
        packing_self_test(build(tmp_path, architecture, 'sdpa', precision), VOCAB, 512, 'cpu')


def test_attention_that_ignores_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, '_attend_documents', lambda module, q, k, v, lengths, kwargs: document_attention.ALL_ATTENTION_FUNCTIONS['sdpa'](module, q, k, v, None, **kwargs)[0])
    with pytest.raises(PackingSelfTestError, match='documents see each other'):
        packing_self_test(build(tmp_path, 'llama', 'sdpa'), VOCAB, 512, 'cpu')


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('architecture', ['gpt2', 'opt'])
def test_positions_that_run_on(architecture: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, 'positions_within_documents', lambda ids: torch.arange(ids.shape[1]).expand_as(ids))
    with pytest.raises(PackingSelfTestError, match='do not see each other, but packed they do not come out as alone.*Positions'):
        packing_self_test(build(tmp_path, architecture, 'sdpa', precision), VOCAB, 512, 'cpu')


def test_a_window_that_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, '_window_mask', lambda size, window, device: None)
    with pytest.raises(PackingSelfTestError, match='do not come out as alone'):
        packing_self_test(build(tmp_path, 'mistral', 'sdpa'), VOCAB, 512, 'cpu')


def test_windows_longer_than_the_usual_row(tmp_path: Path) -> None:
    model = build(tmp_path, 'llama')
    short = packing_self_test(model, VOCAB, 2048, 'cpu').tokens
    model.model.config.sliding_window = 200
    assert packing_self_test(model, VOCAB, 2048, 'cpu').tokens > short + 200
    assert packing_self_test(model, VOCAB, 16, 'cpu').tokens <= 32


def test_a_recurrent_model_is_refused_by_name(tmp_path: Path) -> None:
    # transformers 5 lists its layers as linear_attention, before that the class says that it is stateful.
    with pytest.raises(PackingSelfTestError, match=r'MambaForCausalLM \(attention eager\): .* carr(y|ies) state from one document into the next.*in the dataset\.$'):
        packing_self_test(build(tmp_path, 'mamba', 'eager'), VOCAB, 512, 'cpu')


def test_a_recurrent_model_that_looks_like_a_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Code of a repository may do anything behind a forward that takes position ids.
    monkeypatch.setattr(composer_base, 'separate_documents', lambda model, inputs, sequence_id, routes: inputs)
    with pytest.raises(PackingSelfTestError, match='documents see each other'):
        packing_self_test(build(tmp_path, 'mamba', 'eager'), VOCAB, 512, 'cpu')


def test_a_wrong_loss_over_right_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tmp_path, 'llama')
    model._packing_routes['cpu'] = PackingRoute('block_mask')
    forward = type(model).forward

    def blind_in_training(self: Any, batch: Any) -> Any:
        return forward(self, {key: value for key, value in batch.items() if key != 'sequence_id'} if 'labels' in batch else batch)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0)
    assert packing_self_test(model, VOCAB, 512, 'cpu').leak == 0
    monkeypatch.setattr(type(model), 'forward', blind_in_training)
    with pytest.raises(PackingSelfTestError, match='the loss of a packed batch is .*, that of its documents alone'):
        packing_self_test(model, VOCAB, 512, 'cpu')


def test_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip('peft')
    report = packing_self_test(build(tmp_path, 'llama', peft_config={'r': 2, 'target_modules': ['q_proj']}), VOCAB, 512, 'cpu')
    assert report.backend == 'LlamaForCausalLM (attention sdpa)'
