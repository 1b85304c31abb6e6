"""``hf_generate.py``: prompts in, text and latency out, from any Hugging Face causal language model.

Parsing stays free of torch, so that ``--help`` answers at once; the work is in ``generation``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from typing import Any, Sequence

from llmfoundry.command_utils.error_report import exit_code_of
from llmfoundry.command_utils.inference.arguments import add_hub_flags, boolean
from llmfoundry.typed_registry import resolve_target

__all__ = ['DEFAULT_PROMPTS', 'GenerateArgs', 'main', 'parse_args']

DEFAULT_PROMPTS = ('My name is', 'This is an explanation of deep learning to a five year old. Deep learning is')


@dataclass(frozen=True)
class GenerateArgs:
    """Arguments of generation; see ``--help``. The lists form a cartesian product."""

    name_or_path: str
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    prompt_delimiter: str | None = None
    max_seq_len: int | None = None
    max_new_tokens: int = 100
    max_batch_size: int | None = None
    temperature: tuple[float, ...] = (1.0,)
    top_k: tuple[int, ...] = (50,)
    top_p: tuple[float, ...] = (1.0,)
    repetition_penalty: tuple[float, ...] = (1.0,)
    no_repeat_ngram_size: tuple[int, ...] = (0,)
    seed: tuple[int, ...] = (42,)
    do_sample: bool = True
    use_cache: bool = True
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    model_dtype: str | None = None
    autocast_dtype: str | None = None
    warmup: bool = True
    trust_remote_code: bool = False
    use_auth_token: str | None = None
    revision: str | None = None
    device: str | None = None
    device_map: str | None = None
    attn_impl: str | None = None

    def __post_init__(self) -> None:
        if self.device and self.device_map:
            raise ValueError(f'You can only set one of `device` and `device_map`, got --device {self.device} and --device_map {self.device_map}')
        if not self.prompts:
            raise ValueError('--prompts needs at least one prompt')
        for name, least in (('max_new_tokens', 1), ('max_batch_size', 1), ('max_seq_len', 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f'--{name} must be at least {least}, got {value}')
        if any(t < 0 for t in self.temperature):
            raise ValueError(f'--temperature must not be negative (0 turns sampling off), got {min(self.temperature)}')
        if any(not 0 < p <= 1 for p in self.top_p):
            raise ValueError(f'--top_p must lie in (0, 1], got {list(self.top_p)}')


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the text, the sampling and the batches."""
    parser.add_argument('-p', '--prompts', nargs='*', default=list(DEFAULT_PROMPTS), help='prompts; file::PATH reads a file (default: two short ones)')
    parser.add_argument('--prompt-delimiter', default=None, help='splits the prompts of a file::PATH, for example "\\n"')
    parser.add_argument('--max_seq_len', type=int, default=None, help='overrides max_seq_len of the model, tokens')
    parser.add_argument('--max_new_tokens', type=int, default=100, help='tokens to generate (default: %(default)s)')
    parser.add_argument('--max_batch_size', type=int, default=None, help='prompts per batch; default: all')
    lists: tuple[tuple[str, Any, Any, str], ...] = (
        ('temperature', float, 1.0, '0 turns sampling off'), ('top_k', int, 50, '0 keeps all tokens'), ('top_p', float, 1.0, '1 keeps all tokens'),
        ('repetition_penalty', float, 1.0, '1 is none'), ('no_repeat_ngram_size', int, 0, '0 is off'), ('seed', int, 42, 'of the sampling'),
    )
    for name, kind, default, note in lists:
        parser.add_argument(f'--{name}', type=kind, nargs='+', default=[default], help=f'one or more values, {note}; several lists form a cartesian product (default: {default})')
    for name in ('do_sample', 'use_cache', 'warmup'):
        parser.add_argument(f'--{name}', type=boolean, nargs='?', const=True, default=True, help='true or false (default: true)')
    parser.add_argument('--eos_token_id', type=int, default=None, help="default: the tokenizer's")
    parser.add_argument('--pad_token_id', type=int, default=None, help="default: the tokenizer's, or eos")


def parse_args(argv: Sequence[str] | None = None) -> GenerateArgs:
    """Arguments from the command line.

    Raises:
        ValueError: values that exclude each other or lie out of range.
    """
    parser = argparse.ArgumentParser(prog='hf_generate.py', description='Generate text from a Hugging Face model and print how long it takes.')
    parser.add_argument('-n', '--name_or_path', required=True, help='folder or name on the Hub')
    _add_generation_flags(parser)
    parser.add_argument('--model_dtype', choices=['fp32', 'fp16', 'bf16'], default=None, help='precision of the weights; default: as saved')
    parser.add_argument('--autocast_dtype', choices=['fp32', 'fp16', 'bf16'], default=None, help='run under torch.autocast in this precision; default: off')
    parser.add_argument('--device', default=None, help='cpu, cuda, cuda:1, ...; not together with --device_map')
    parser.add_argument('--device_map', default=None, help='auto, balanced, ... (needs the package accelerate); default: auto where there is a GPU and accelerate, else one device')
    parser.add_argument('--attn_impl', default=None, help='attention implementation: torch or flash for MPT, eager, sdpa or flash_attention_2 for others')
    add_hub_flags(parser)
    values = vars(parser.parse_args(argv))
    return GenerateArgs(**{f.name: tuple(values[f.name]) if isinstance(values[f.name], list) else values[f.name] for f in fields(GenerateArgs)})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script; 1 with one message for what a user can mend."""
    def parse_and_generate() -> None:
        args = parse_args(argv)  # before torch is imported
        resolve_target('llmfoundry.command_utils.inference.generation:generate')(args)

    return exit_code_of(parse_and_generate)


if __name__ == '__main__':
    sys.exit(main())
