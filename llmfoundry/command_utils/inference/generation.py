"""Loads a causal language model and generates from prompts under every combination of the sampling settings."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import random
import sys
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ContextManager, Iterator

import numpy as np
import torch
import transformers

from llmfoundry.command_utils.inference.arguments import seconds
from llmfoundry.command_utils.inference.hf_generate import GenerateArgs
from llmfoundry.command_utils.inference.prompts import load_prompts
from llmfoundry.models.hf.load import DTYPE_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ['GenerationResult', 'generate', 'load_model', 'load_tokenizer', 'sampling_settings']

_DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
_GREEN, _BLUE, _PLAIN = ('\033[92m', '\033[94m', '\033[0m') if sys.stdout.isatty() else ('', '', '')
_REMOTE_CODE_REMEDY = (
    '{name!r} carries its own model code (`auto_map` in its config.json). Running it needs your consent: pass --trust_remote_code true. A folder written by '
    'convert_composer_to_hf.py carries the code of llmfoundry; look at foreign code before you allow it.'
)


@dataclass(frozen=True)
class GenerationResult:
    """One combination of settings, generated.

    ``texts`` holds prompt and continuation; ``latency_s`` is the wall time of all batches, ``output_tokens`` the generated tokens without padding.
    """

    settings: dict[str, Any]
    texts: list[str]
    latency_s: float
    input_tokens: int
    output_tokens: int


def _hub_arguments(args: GenerateArgs) -> dict[str, Any]:
    arguments: dict[str, Any] = {'trust_remote_code': args.trust_remote_code}
    if args.revision is not None:
        arguments['revision'] = args.revision
    if args.use_auth_token is not None:
        arguments['token'] = args.use_auth_token or True
    return arguments


@contextlib.contextmanager
def _explain_loading(name: str, use_auth_token: str | None) -> Iterator[None]:
    """Turns failures of the Hub into one line with the remedy."""
    try:
        yield
    except OSError as e:
        hint = '' if use_auth_token is not None else ' If it is private, log in with `hf auth login` or pass --use_auth_token.'
        raise RuntimeError(f'{name!r} cannot be loaded: it is neither a folder here nor a repository that the Hub lets you read.{hint} Cause: {e}') from e


def load_config(args: GenerateArgs) -> Any:
    """The model's config with the overrides of the command line.

    Raises:
        ValueError: the model carries code and ``trust_remote_code`` is off.
        RuntimeError: it cannot be found or read.
    """
    with _explain_loading(args.name_or_path, args.use_auth_token):
        raw, _ = transformers.PretrainedConfig.get_config_dict(args.name_or_path, **{k: v for k, v in _hub_arguments(args).items() if k != 'trust_remote_code'})
        # Checked by hand: for a model type that transformers also knows (mpt), it would silently take its own class instead.
        if 'AutoModelForCausalLM' in raw.get('auto_map', {}) and not args.trust_remote_code:
            raise ValueError(_REMOTE_CODE_REMEDY.format(name=args.name_or_path))
        config = transformers.AutoConfig.from_pretrained(args.name_or_path, **_hub_arguments(args))
    if args.max_seq_len is not None:
        if not hasattr(config, 'max_seq_len'):
            raise ValueError(f'--max_seq_len: the config of {args.name_or_path!r} ({type(config).__name__}) has no max_seq_len')
        config.max_seq_len = args.max_seq_len
    if args.attn_impl is not None and isinstance(getattr(config, 'attn_config', None), dict):
        config.attn_config['attn_impl'] = args.attn_impl
    if hasattr(config, 'init_device'):
        config.init_device = 'cpu'
    return config


def _placement(args: GenerateArgs) -> tuple[str | None, str | None]:
    """(device, device_map), of which one is None.

    Raises:
        ValueError: a device map without accelerate, or CUDA on a machine without.
    """
    has_accelerate = importlib.util.find_spec('accelerate') is not None
    if args.device_map is not None:
        if not has_accelerate:
            raise ValueError(f'--device_map {args.device_map} needs the package accelerate (`pip install accelerate`); or use --device')
        return None, args.device_map
    if args.device is not None:
        if args.device.startswith('cuda') and not torch.cuda.is_available():
            raise ValueError(f'--device {args.device}: torch sees no CUDA device here; use --device cpu')
        return args.device, None
    if torch.cuda.is_available():
        return (None, 'auto') if has_accelerate else ('cuda', None)
    return 'cpu', None


def load_model(args: GenerateArgs) -> PreTrainedModel:
    """The model in evaluation mode where the arguments put it."""
    config = load_config(args)
    device, device_map = _placement(args)
    arguments = {**_hub_arguments(args), 'config': config, DTYPE_KEY: _DTYPES[args.model_dtype] if args.model_dtype else 'auto'}
    if device_map is not None:
        arguments['device_map'] = device_map
    if args.attn_impl is not None and not isinstance(getattr(config, 'attn_config', None), dict):
        arguments['attn_implementation'] = args.attn_impl
    with _explain_loading(args.name_or_path, args.use_auth_token):
        model = transformers.AutoModelForCausalLM.from_pretrained(args.name_or_path, **arguments)
    model.eval()
    return model if device is None else model.to(device)


def load_tokenizer(args: GenerateArgs) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left, which generation needs, with a pad token."""
    with _explain_loading(args.name_or_path, args.use_auth_token):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.name_or_path, padding_side='left', **_hub_arguments(args))
    if tokenizer.pad_token_id is None and args.pad_token_id is None:
        warnings.warn('pad_token_id is not set for the tokenizer. Using eos_token_id as pad_token_id.')
        if tokenizer.eos_token is None:
            raise ValueError(f'the tokenizer of {args.name_or_path!r} has neither a pad nor an eos token; pass --pad_token_id')
        tokenizer.pad_token = tokenizer.eos_token
    elif args.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(args.pad_token_id)
    return tokenizer


def sampling_settings(args: GenerateArgs) -> list[dict[str, Any]]:
    """One set of ``generate`` arguments (and a ``seed``) per combination of the lists; a temperature of 0 turns sampling off."""
    settings = []
    for temperature, top_p, top_k, penalty, ngram, seed in itertools.product(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.no_repeat_ngram_size, args.seed):
        entry: dict[str, Any] = {'seed': seed, 'repetition_penalty': penalty, 'no_repeat_ngram_size': ngram, 'do_sample': args.do_sample and temperature > 0}
        if entry['do_sample']:
            entry.update(temperature=temperature, top_p=top_p, top_k=top_k)
        settings.append(entry)
    return settings


def _autocast(model: PreTrainedModel, autocast_dtype: str | None) -> ContextManager[Any]:
    if autocast_dtype is None or autocast_dtype == 'fp32':
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=_DTYPES[autocast_dtype])


def _generate_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], args: GenerateArgs, settings: dict[str, Any]) -> GenerationResult:
    """Generates for all prompts in batches of at most ``max_batch_size``."""
    seed = settings['seed']
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    eos = tokenizer.eos_token_id if args.eos_token_id is None else args.eos_token_id
    pad = tokenizer.pad_token_id if args.pad_token_id is None else args.pad_token_id
    arguments = {k: v for k, v in settings.items() if k != 'seed'}
    size = args.max_batch_size or len(prompts)
    texts: list[str] = []
    input_tokens = output_tokens = 0
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        batch = tokenizer(prompts[first : first + size], return_tensors='pt', padding=True).to(model.device)
        batch.pop('token_type_ids', None)
        with torch.no_grad(), _autocast(model, args.autocast_dtype):
            generated = model.generate(**batch, max_new_tokens=args.max_new_tokens, use_cache=args.use_cache, eos_token_id=eos, pad_token_id=pad, **arguments)
        new = generated[:, batch['input_ids'].shape[1] :].tolist()
        input_tokens += int(batch['attention_mask'].sum())
        output_tokens += sum(_length(row, eos) for row in new)
        texts += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return GenerationResult(settings, texts, time.perf_counter() - start, input_tokens, output_tokens)


def _length(tokens: list[int], eos: int | None) -> int:
    """Generated tokens up to and with the first eos; what follows is padding."""
    return tokens.index(eos) + 1 if eos in tokens else len(tokens)


def generate(args: GenerateArgs) -> list[GenerationResult]:
    """Loads, generates and prints.

    Raises:
        ValueError: arguments that do not fit the model; the model carries code and ``trust_remote_code`` is off.
        RuntimeError: the model cannot be loaded.
        FileNotFoundError: a ``file::`` prompt without its file.
    """
    prompts = load_prompts(args.prompts, args.prompt_delimiter)
    print(f'Loading {args.name_or_path}')
    start = time.perf_counter()
    model = load_model(args)
    tokenizer = load_tokenizer(args)
    count = sum(p.numel() for p in model.parameters())
    print(f'{type(model).__name__}: {count:,} parameters in {next(model.parameters()).dtype} on {model.device}, loaded in {seconds(time.perf_counter() - start)}')
    combinations = sampling_settings(args)
    if args.warmup:
        _generate_batches(model, tokenizer, prompts, args, combinations[0])
    results = []
    for settings in combinations:
        result = _generate_batches(model, tokenizer, prompts, args, settings)
        _print_result(result, prompts)
        results.append(result)
    return results


def _print_result(result: GenerationResult, prompts: list[str]) -> None:
    print('\n' + '#' * 80)
    print(', '.join(f'{k}={v}' for k, v in result.settings.items()))
    for prompt, text in zip(prompts, result.texts, strict=True):
        continuation = text[len(prompt) :] if text.startswith(prompt) else text
        print(f'{_BLUE}{prompt}{_PLAIN}{_GREEN}{continuation}{_PLAIN}\n')
    per_token = result.latency_s / max(result.output_tokens, 1)
    print(
        f'batch size: {len(prompts)}, input tokens: {result.input_tokens}, output tokens: {result.output_tokens}, latency: {seconds(result.latency_s)}, '
        f'{result.output_tokens / result.latency_s:.1f} output tokens/s, {seconds(per_token)} per output token',
    )
