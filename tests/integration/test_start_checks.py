"""A finetuning run starts with its checks, and a fault that would make no noise stops it before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.errors import UserError
from tests.helpers.tiny_hf import save_config
from tests.helpers.tokenizers import save_tokenizer, smollm2_tokenizer
from tests.helpers.train_runs import SEQ_LEN, run_config, tiny_config, train_losses

CHATS = [
    {'messages': [
        {'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': f'{i} it is.'},
        {'role': 'user', 'content': 'And?'}, {'role': 'assistant', 'content': 'No more.'},
    ]}
    for i in range(24)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))


def finetuning(folder: Path, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    rows = folder / 'chats.jsonl'
    rows.write_text(''.join(json.dumps(row) + '\n' for row in CHATS))
    dataset = {
        'hf_name': 'json', 'hf_kwargs': {'data_files': {'train': str(rows)}}, 'split': 'train', 'max_seq_len': 64, 'decoder_only_format': True, 'shuffle': True, 'packing': True,
    }
    config = tiny_config(folder, tokenizer={'name': save_tokenizer(tokenizer, folder / 'tokenizer')}, train_loader={'name': 'finetuning', 'dataset': dataset, 'num_workers': 0})
    config |= {'max_seq_len': 64, 'global_train_batch_size': 2, 'device_train_microbatch_size': 1, 'max_duration': '2ba'}
    config['model'] |= {'max_seq_len': 64}
    return {**config, **changes}


def test_what_a_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(train_losses(run_config(finetuning(tmp_path, smollm2_tokenizer())))) == 2
    out = capsys.readouterr().out
    assert 'of the tokens in the first 24 rows are trained; 24 rows in all, 0 cut at max_seq_len, none dropped' in out
    assert 'Packing self-test passed for MPTForCausalLM (attn_impl torch)' in out
    assert 'attn_uses_sequence_id: true, because train_loader puts several documents into a row' in out


def test_a_template_without_terminator_stops_the_run(tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] + '<|im_end|>' + '\n'", "message['content'] + '\n'")
    config = finetuning(tmp_path, tokenizer)
    config['train_loader']['dataset']['target_responses'] = 'all'
    with pytest.raises(UserError, match=r'train_loader: the data would teach the wrong thing'):
        run_config(config)


def test_a_model_whose_documents_see_each_other_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a new release of a model ignores the mask that it is given."""
    from llmfoundry.models.mpt import modeling_backbone

    config = finetuning(tmp_path, smollm2_tokenizer())
    build_mask = modeling_backbone.build_mask
    monkeypatch.setattr(modeling_backbone, 'build_mask', lambda attention_mask, sequence_id, slopes: build_mask(attention_mask, None, slopes))
    with pytest.raises(UserError, match=r'Packing self-test failed for MPTForCausalLM \(attn_impl torch\)'):
        run_config(config)


def test_a_model_that_cannot_keep_documents_apart_stops_the_run(tmp_path: Path) -> None:
    model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': save_config(tmp_path / 'model', 'mamba', vocab_size=49152), 'pretrained': False, 'init_device': 'cpu'}
    with pytest.raises(UserError, match=r'Packing self-test failed for MambaForCausalLM'):
        run_config(finetuning(tmp_path, smollm2_tokenizer(), model=model))


def test_text_without_separators_is_not_tested_for_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.train_runs import make_data

    run_config(tiny_config(make_data(tmp_path / 'data'), max_duration='1ba', max_seq_len=SEQ_LEN))
    out = capsys.readouterr().out
    assert 'are trained' in out and 'self-test' not in out
