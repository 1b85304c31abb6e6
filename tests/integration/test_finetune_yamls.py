"""Every finetune YAML trains two steps here: as shipped where it is small, else with a tiny model of the same class, local rows and one process.

What is replaced is what a laptop does not have (weights, data of the Hub, GPUs); loaders, packing, LoRA, optimizers and schedules are those of the file.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest

from llmfoundry.config.load import load_train_config
from tests.helpers.mds import write_token_mds
from tests.helpers.tiny_hf import save_config
from tests.helpers.train_runs import ROOT, metrics_of
from tests.helpers.workspace import make_workspace, run_command

FINETUNE = sorted((ROOT / 'yamls/finetune').glob('*.yaml'))
EXAMPLE = ROOT / 'scripts/train/finetune_example'
# Trained in tests of their own, from the model that `make quickstart` leaves or the one that the demo fetches.
ELSEWHERE = {'quickstart-full', 'smollm2-135m-lora'}
SEQ_LEN = 64
VOCAB = 50257
LAPTOP = [
    f'max_seq_len={SEQ_LEN}', 'max_duration=2ba', 'global_train_batch_size=4', 'device_train_microbatch_size=2', 'device_eval_batch_size=2', 'precision=fp32', 'fsdp_config=null',
    'tokenizer.name=llmfoundry://gpt2', 'loggers.inmemory={}', 'log_config=false', 'train_loader.num_workers=0', 'python_log_level=warning', 'callbacks=null',
]  # fmt: skip
NO_EVALUATION = ['eval_loader=null', 'eval_interval=0', 'eval_first=false']


def _tiny(folder: Path, kind: str) -> list[str]:
    """Overrides that put a tiny, newly initialised model of the same class in the place of the published one."""
    if kind == 'mpt_causal_lm':
        return ['model.d_model=16', 'model.n_heads=2', 'model.n_layers=1', f'model.vocab_size={VOCAB}', 'model.init_device=cpu', 'model.attn_config.attn_impl=torch']
    model = folder / 'model'
    if kind == 'mpt':
        config = {'model_type': 'mpt', 'd_model': 16, 'n_heads': 2, 'n_layers': 1, 'expansion_ratio': 2, 'max_seq_len': SEQ_LEN, 'vocab_size': VOCAB}
        model.mkdir()
        (model / 'config.json').write_text(json.dumps(config))
    elif kind == 'dbrx':
        import transformers

        transformers.DbrxConfig(
            d_model=16, n_heads=2, n_layers=1, max_seq_len=SEQ_LEN, vocab_size=VOCAB,
            attn_config={'kv_n_heads': 1, 'rope_theta': 1e4}, ffn_config={'ffn_hidden_size': 16, 'moe_num_experts': 2, 'moe_top_k': 1},
        ).save_pretrained(model)  # fmt: skip
    elif kind == 't5':
        import transformers

        transformers.T5Config(
            d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=VOCAB + 3, decoder_start_token_id=50256, eos_token_id=50256, pad_token_id=50256,
        ).save_pretrained(model)  # fmt: skip
    else:
        save_config(model, kind, vocab_size=VOCAB, max_position_embeddings=SEQ_LEN)
    changes = [f'model.pretrained_model_name_or_path={model}', 'model.pretrained=false', 'model.init_device=cpu']
    if kind == 'mpt':
        changes.append('model.config_overrides.attn_config.attn_impl=torch')
    return changes


def _rows(folder: Path) -> Path:
    (folder / 'data').mkdir()
    for split, count in (('train', 40), ('test', 8)):
        rows = [{'prompt': f'Say {word} {i} times.', 'response': ' '.join([word] * (1 + i % 9))} for i, word in zip(range(count), ['one', 'two', 'three'] * count, strict=False)]
        (folder / 'data' / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder / 'data'


def _local_rows(folder: Path) -> list[str]:
    data = _rows(folder)
    return [f'{loader}.dataset.{key}' for loader in ('train_loader', 'eval_loader') for key in ('hf_name=json', f'hf_kwargs.data_dir={data}')] + ['eval_loader.num_workers=0']


def _domain_texts(folder: Path) -> list[str]:
    for split, count in (('train', 16), ('val', 4)):
        write_token_mds(folder / 'texts' / split, [[(7 * i + k) % 50 for k in range(SEQ_LEN)] for i in range(count)])
    return [f'variables.data_local={folder / "texts"}', 'eval_loader.num_workers=0']


# YAML -> model in place of the published one, and data in place of those of the Hub.
REPLACED: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    '1b_local_data_sft': ('mpt_causal_lm', lambda folder: [f'variables.data_local={_rows(folder)}', 'eval_loader.num_workers=0']),
    '7b_dolly_sft': ('mpt_causal_lm', _local_rows),
    'mpt-7b_dolly_sft': ('mpt', _local_rows),
    'mpt-30b-instruct': ('mpt', _local_rows),
    't5-small_dolly_sft': ('t5', _local_rows),
    'llama-3-8b_domain_adapt': ('llama', _domain_texts),
    'dbrx-full-ft': ('dbrx', _local_rows),
    'dbrx-lora-ft': ('dbrx', _local_rows),
}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('hf'))


def _train(path: Path, overrides: list[str]) -> Any:
    from llmfoundry.command_utils.train import train_from_yaml

    trainer = train_from_yaml(str(path), overrides)
    trainer.close()
    return trainer


def test_every_finetune_yaml_is_run() -> None:
    assert {p.stem for p in FINETUNE} == {*REPLACED, *ELSEWHERE, 'gpt2-arc-easy-cpu-streaming-dataset'}
    assert len(FINETUNE) == 11


@pytest.mark.parametrize('stem', REPLACED)
def test_yaml_trains_with_a_tiny_model(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, data = REPLACED[stem]
    path = ROOT / 'yamls/finetune' / f'{stem}.yaml'
    changes = [*LAPTOP, *_tiny(tmp_path, kind), *data(tmp_path)]
    if 'use_flash_attention_2' in path.read_text():
        changes.append('model.use_flash_attention_2=false')
    trainer = _train(path, [*changes, 'eval_interval=1ep', 'eval_first=true'])
    losses = metrics_of(trainer, 'loss/train/total')
    assert len(losses) == 2 and all(8 < loss < 14 for loss in losses)
    assert metrics_of(trainer, 'metrics/eval/LanguageCrossEntropy'), 'eval_first evaluates the split that the file names'
    trained = {name for name, p in trainer.state.model.named_parameters() if p.requires_grad}
    assert trained and all('lora_' in name for name in trained) == ('lora' in stem)


@pytest.mark.parametrize('stem', ['7b_dolly_sft', 'mpt-7b_dolly_sft', 'dbrx-lora-ft'])
def test_packed_yamls_give_packed_rows(stem: str, tmp_path: Path) -> None:
    from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
    from llmfoundry.tokenizers.build import build_tokenizer

    config = load_train_config(ROOT / 'yamls/finetune' / f'{stem}.yaml', [*LAPTOP, *_local_rows(tmp_path), *NO_EVALUATION])
    spec = build_finetuning_dataloader(build_tokenizer('llmfoundry://gpt2'), 4, config.train_loader['dataset'], 0, drop_last=True, pin_memory=False)
    assert next(iter(spec.dataloader))['sequence_id'].max() > 0


def test_the_example_trains_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From scripts/train, with nothing but its length changed."""
    monkeypatch.chdir(ROOT / 'scripts/train')
    trainer = _train(Path('finetune_example/gpt2-arc-easy--cpu.yaml'), ['loggers.inmemory={}', 'max_duration=1ep'])
    losses = metrics_of(trainer, 'loss/train/total')
    assert len(losses) == 25 and losses[0] == pytest.approx(10.8, abs=0.2) and sum(losses[-5:]) / 5 < 8
    assert metrics_of(trainer, 'metrics/eval/LanguageCrossEntropy')[0] < 7


def test_the_gpu_example_has_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / 'scripts/train')
    changes = [*LAPTOP, *_tiny(tmp_path, 'llama'), 'model.use_flash_attention_2=false', 'eval_loader.num_workers=0']
    trainer = _train(EXAMPLE / 'llama-3-8b-arc-easy--gpu.yaml', changes)
    assert len(metrics_of(trainer, 'loss/train/total')) == 2


def test_the_example_rows() -> None:
    rows = [json.loads(line) for line in (EXAMPLE / 'train.jsonl').read_text().splitlines()]
    assert len(rows) == 226 and len({row['query'] for row in rows}) == 226
    for row in rows:
        assert set(row) == {'query', 'choices', 'gold'} and len(set(row['choices'])) == 4 and 0 <= row['gold'] < 4
    counts = [sum(row['gold'] == i for row in rows) for i in range(4)]
    assert min(counts) > 40, 'the place of the right choice tells nothing'


def test_the_streaming_yaml_after_its_conversion(tmp_path: Path) -> None:
    """Both commands of its header, in a fresh clone."""
    workspace = make_workspace(tmp_path / 'clone')
    yaml = workspace / 'yamls/finetune/gpt2-arc-easy-cpu-streaming-dataset.yaml'
    header = yaml.read_text().split('\n\n')[0]
    convert = re.search(r'# Data:\s+(.*?)\n# Command:', header, re.DOTALL)
    assert convert is not None
    command = re.sub(r'\\\n#\s+', '', convert[1])
    result = run_command(command, workspace)
    assert result.returncode == 0, result.stderr[-3000:]
    train = next(line.removeprefix('# Command:').strip() for line in header.splitlines() if line.startswith('# Command:'))
    metrics = workspace / 'metrics.jsonl'
    result = run_command(f'{train} loggers.jsonl.path={metrics}', workspace, LLMFOUNDRY_CACHE=str(tmp_path / 'cache'))
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [row['loss/train/total'] for row in map(json.loads, metrics.read_text().splitlines()) if 'loss/train/total' in row]
    assert len(losses) > 20 and losses[0] == pytest.approx(10.8, abs=0.2) and sum(losses[-5:]) / 5 < 8, losses
    shutil.rmtree(workspace / 'my-copy-arc-easy')
