"""hf_generate: flags, sampling settings, prompts, and text from a real folder."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import transformers

from llmfoundry.command_utils.inference import generation
from llmfoundry.command_utils.inference.arguments import boolean
from llmfoundry.command_utils.inference.hf_generate import DEFAULT_PROMPTS, GenerateArgs, main, parse_args
from llmfoundry.command_utils.inference.prompts import load_prompts, load_prompts_from_file

SCRIPT = Path(__file__).resolve().parents[2] / 'scripts' / 'inference' / 'hf_generate.py'


def args_for(folder: Path, *more: str) -> GenerateArgs:
    return parse_args(['-n', str(folder), '--trust_remote_code', 'true', '--max_new_tokens', '4', *more])


def test_defaults() -> None:
    args = parse_args(['-n', 'x'])
    assert args == GenerateArgs('x')
    assert args.prompts == DEFAULT_PROMPTS and len(args.prompts) == 2
    assert (args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens) == ((1.0,), (50,), (1.0,), (42,), 100)
    assert args.do_sample and args.use_cache and args.warmup and not args.trust_remote_code


def test_all_flags() -> None:
    args = parse_args(
        '-n x -p a b --prompt-delimiter ; --max_seq_len 8 --max_new_tokens 3 --max_batch_size 2 --temperature 0.5 1 --top_k 1 2 --top_p 0.9 --repetition_penalty 1.1 '
        '--no_repeat_ngram_size 2 --seed 1 2 3 --do_sample false --use_cache no --eos_token_id 5 --pad_token_id 6 --model_dtype bf16 --autocast_dtype fp16 --warmup 0 '
        '--trust_remote_code --use_auth_token tok --revision main --device cpu --attn_impl torch'.split(),
    )
    assert args.prompts == ('a', 'b') and args.seed == (1, 2, 3) and not args.do_sample and not args.use_cache and not args.warmup and args.trust_remote_code
    assert (args.eos_token_id, args.pad_token_id, args.device, args.device_map) == (5, 6, 'cpu', None)


def test_lists_form_a_cartesian_product_and_zero_is_greedy() -> None:
    settings = generation.sampling_settings(GenerateArgs('x', temperature=(0.0, 0.7), top_k=(1, 5), seed=(1, 2, 3)))
    assert len(settings) == 2 * 2 * 3
    greedy = [s for s in settings if not s['do_sample']]
    assert len(greedy) == 6 and not any('temperature' in s or 'top_k' in s for s in greedy)
    assert {(s['temperature'], s['top_k'], s['seed']) for s in settings if s['do_sample']} == {(0.7, k, s) for k in (1, 5) for s in (1, 2, 3)}
    assert not generation.sampling_settings(GenerateArgs('x', do_sample=False))[0]['do_sample']


@pytest.mark.parametrize(
    ('flags', 'text'),
    [
        (['--device', 'cpu', '--device_map', 'auto'], 'You can only set one of `device` and `device_map`'),
        (['--temperature', '-1'], 'must not be negative'),
        (['--top_p', '0'], r'must lie in \(0, 1\]'),
        (['--max_new_tokens', '0'], '--max_new_tokens must be at least 1'),
        (['--max_batch_size', '0'], '--max_batch_size must be at least 1'),
        (['-p'], 'at least one prompt'),
    ],
)
def test_values_that_cannot_be(flags: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_args(['-n', 'x', *flags])


def test_booleans_are_read_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [boolean(t) for t in ('true', 'False', '1', '0', 'YES', 'off')] == [True, False, True, False, True, False]
    with pytest.raises(SystemExit):
        parse_args(['-n', 'x', '--do_sample', 'maybe'])
    assert "'maybe' is not a boolean" in capsys.readouterr().err


def test_prompts_from_files(tmp_path: Path) -> None:
    path = tmp_path / 'p.txt'
    path.write_text('one\ntwo\n\n')
    assert load_prompts(['x', f'file::{path}']) == ['x', 'one\ntwo\n\n']
    assert load_prompts([f'file::{path}', 'y'], '\\n') == ['one', 'two', 'y']
    with pytest.raises(FileNotFoundError, match='no file at'):
        load_prompts(['file::/nowhere/p.txt'])
    with pytest.raises(ValueError, match="must start with 'file::'"):
        load_prompts_from_file(str(path))
    path.write_text(' \n')
    with pytest.raises(ValueError, match='holds no prompt'):
        load_prompts([f'file::{path}'])


def test_code_in_a_folder_needs_consent(mpt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['-n', str(mpt_folder)]) == 1
    error = capsys.readouterr().err
    assert 'carries its own model code' in error and 'pass --trust_remote_code true' in error


def test_a_model_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['-n', str(tmp_path / 'absent')]) == 1
    assert 'cannot be loaded' in capsys.readouterr().err
    assert main(['-n', 'nobody/no-such-model']) == 1
    assert 'log in with `hf auth login` or pass --use_auth_token' in capsys.readouterr().err


def test_greedy_text_is_that_of_the_model_alone(mpt_folder: Path) -> None:
    """Batched with left padding, the short prompt continues as if it were alone."""
    prompts = ('It is a truth universally acknowledged, that a', 'Hello')
    both = generation.generate(args_for(mpt_folder, '-p', *prompts, '--temperature', '0', '--warmup', 'false'))
    assert len(both) == 1 and both[0].input_tokens == 10 and 0 < both[0].output_tokens <= 8 and both[0].latency_s > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(mpt_folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(mpt_folder)
    for prompt, text in zip(prompts, both[0].texts, strict=True):
        alone = tokenizer(prompt, return_tensors='pt')
        with torch.no_grad():
            ids = model.generate(**alone, max_new_tokens=4, do_sample=False, pad_token_id=50256)
        assert text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_batches_seeds_and_product(mpt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = generation.generate(args_for(mpt_folder, '-p', 'a', 'b', 'c', '--max_batch_size', '2', '--temperature', '0', '1', '--seed', '1', '2', '--autocast_dtype', 'bf16'))
    assert [len(r.texts) for r in results] == [3] * 4
    greedy_1, greedy_2, sampled_1, sampled_2 = (r.texts for r in results)
    assert greedy_1 == greedy_2 and sampled_1 != sampled_2
    again = generation.generate(args_for(mpt_folder, '-p', 'a', 'b', 'c', '--max_batch_size', '2', '--seed', '1', '--autocast_dtype', 'bf16', '--warmup', 'false'))
    assert again[0].texts == sampled_1, 'a seed fixes the text, whatever was generated before'
    out = capsys.readouterr().out
    assert out.count('output tokens/s') == 5 and 'latency: ' in out


def test_overrides_reach_the_model(mpt_folder: Path) -> None:
    model = generation.load_model(args_for(mpt_folder, '--max_seq_len', '32', '--model_dtype', 'bf16', '--attn_impl', 'torch'))
    assert model.config.max_seq_len == 32 and next(model.parameters()).dtype == torch.bfloat16 and not model.training
    model = generation.load_model(args_for(mpt_folder, '--attn_impl', 'flash'))
    assert model.config.attn_config['attn_impl'] == 'flash'


def test_pad_token(mpt_folder: Path) -> None:
    with pytest.warns(UserWarning, match='Using eos_token_id as pad_token_id'):
        tokenizer = generation.load_tokenizer(args_for(mpt_folder))
    assert tokenizer.pad_token_id == 50256 and tokenizer.padding_side == 'left'
    assert generation.load_tokenizer(args_for(mpt_folder, '--pad_token_id', '7')).pad_token_id == 7


def test_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert generation._placement(GenerateArgs('x')) == ('cpu', None)
    with pytest.raises(ValueError, match='torch sees no CUDA device'):
        generation._placement(GenerateArgs('x', device='cuda'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(generation.importlib.util, 'find_spec', lambda name: types.SimpleNamespace())
    assert generation._placement(GenerateArgs('x')) == (None, 'auto')
    monkeypatch.setattr(generation.importlib.util, 'find_spec', lambda name: None)
    assert generation._placement(GenerateArgs('x')) == ('cuda', None)
    with pytest.raises(ValueError, match='needs the package accelerate'):
        generation._placement(GenerateArgs('x', device_map='auto'))


@pytest.mark.parametrize('name', ['hf_generate.py', 'convert_composer_to_hf.py'])
def test_help_is_light(name: str) -> None:
    code = f'import sys, runpy; sys.argv = ["{name}", "--help"]\ntry: runpy.run_path({str(SCRIPT.with_name(name))!r}, run_name="__main__")\nfinally: assert "torch" not in sys.modules'
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'usage:' in done.stdout and 'trust_remote_code' in done.stdout
    assert time.perf_counter() - start < 10
