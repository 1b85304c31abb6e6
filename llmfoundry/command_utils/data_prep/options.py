"""The flags that the converters share, as a dataclass and as argparse arguments."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Sequence

from llmfoundry.command_utils.data_prep.engine import ConversionPlan
from llmfoundry.command_utils.data_prep.outputs import available_cores
from llmfoundry.command_utils.data_prep.tokenizer_spec import TokenizerSpec, describe_tokenizer
from llmfoundry.errors import BaseContextualError

__all__ = ['TokenOptions', 'add_common_flags', 'make_plan', 'parse_bool', 'parse_json_object', 'run_main', 'tokenizer_spec_of']


@dataclass(frozen=True)
class TokenOptions:
    """How text becomes samples.

    Attributes:
        bos_text: text put before each document.
        eos_text: text put after each document.
        no_wrap: drop what is left of a document at each cut, instead of beginning the next sample with it.
        tokenizer_kwargs: passed to the tokenizer.
        processes: tokenising processes; None for one per core.
        on_bad_row: ``stop`` at an unusable row, or ``skip``, count and list it.
        use_tiktoken: let tiktoken stand in for a byte-level BPE tokenizer when its ids are the same.
    """

    bos_text: str | None = ''
    eos_text: str | None = ''
    no_wrap: bool = False
    tokenizer_kwargs: dict[str, Any] | None = field(default=None)
    processes: int | None = None
    on_bad_row: str = 'stop'
    use_tiktoken: bool = True


def tokenizer_spec_of(tokenizer: Any, kwargs: dict[str, Any] | None = None) -> TokenizerSpec:
    """What workers need to know of a tokenizer, given by name or as an object of transformers.

    Raises:
        ValueError: it cannot be loaded.
    """
    if isinstance(tokenizer, TokenizerSpec):
        return tokenizer
    if isinstance(tokenizer, str):
        return describe_tokenizer(tokenizer, kwargs)
    if getattr(tokenizer, 'is_fast', False):
        backend = tokenizer.backend_tokenizer.to_str()
        return TokenizerSpec(tokenizer.name_or_path, {}, backend, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token)
    if getattr(tokenizer, 'name_or_path', ''):
        return describe_tokenizer(tokenizer.name_or_path, kwargs)
    raise ValueError(f'tokenizer must be a name, a folder, or a tokenizer of transformers, got {type(tokenizer).__name__}')


def make_plan(
    name: str,
    tokenizer: Any,
    concat_tokens: int | None,
    compression: str | None,
    options: TokenOptions,
    require_separator: bool = False,
) -> ConversionPlan:
    """Checks the arguments and builds the plan.

    Raises:
        ValueError: ``concat_tokens`` without a tokenizer, or a tokenizer that cannot be loaded.
    """
    if concat_tokens is not None and not tokenizer:
        raise ValueError(
            f'When setting --concat_tokens (here {concat_tokens}), you must specify a --tokenizer, for example --tokenizer llmfoundry://gpt2'
        )
    return ConversionPlan(
        name=name,
        tokenizer=tokenizer_spec_of(tokenizer, options.tokenizer_kwargs) if concat_tokens is not None else None,
        concat_tokens=concat_tokens,
        bos_text=options.bos_text or '',
        eos_text=options.eos_text or '',
        no_wrap=options.no_wrap,
        compression=compression or None,
        processes=available_cores() if options.processes is None else options.processes,
        on_bad_row=options.on_bad_row,
        require_separator=require_separator,
        use_tiktoken=options.use_tiktoken,
    )


def parse_bool(text: str) -> bool:
    """``True``/``False``, ``yes``/``no``, ``1``/``0``, any case."""
    lowered = text.strip().lower()
    if lowered in ('true', 't', 'yes', 'y', '1'):
        return True
    if lowered in ('false', 'f', 'no', 'n', '0'):
        return False
    raise argparse.ArgumentTypeError(f'expected true or false, got {text!r}')


def parse_json_object(flag: str, value: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON object that was given for ``flag``; what is none any more is passed through.

    Raises:
        ValueError: text that is not a JSON object.
    """
    if value is None or not isinstance(value, str):
        return None if value is None else dict(value)
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as e:
        raise ValueError(f'{flag} must be JSON, got {value!r} ({e.msg} at column {e.colno})') from None
    if not isinstance(parsed, dict):
        raise ValueError(f'{flag} must be a JSON object, got {value!r}')
    return parsed


def add_common_flags(parser: argparse.ArgumentParser, processes_flag: str, required: bool = False) -> None:
    """Adds the flags that all converters have. ``required`` makes --concat_tokens and --tokenizer mandatory."""
    parser.add_argument('--concat_tokens', type=int, required=required, help='tokenise, and cut into samples of this many tokens')
    parser.add_argument('--tokenizer', type=str, required=required, help='llmfoundry://gpt2, a local folder, or a name on the Hugging Face Hub')
    parser.add_argument('--bos_text', type=str, default=None, help='text to put before each document')
    parser.add_argument('--eos_text', type=str, default=None, help="text to put after each document, for example '<|endoftext|>'")
    parser.add_argument('--no_wrap', action='store_true', help='drop what is left of a document at each cut')
    parser.add_argument(
        processes_flag, type=int, default=None, dest='processes', help='tokenising processes (default: one per core); the shards do not depend on it'
    )
    parser.add_argument('--on_bad_row', choices=('stop', 'skip'), default='stop', help='stop at an unusable row, or leave it out, count and list it')


def run_main(command: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parses the command line and runs; what users can mend ends as one line on stderr and exit code 1."""
    args = parser.parse_args(argv)
    exit_on_user_errors(lambda: command(args))


def exit_on_user_errors(command: Callable[[], Any]) -> None:
    """Runs ``command``, turning errors that a user can mend into one line on stderr and exit code 1."""
    try:
        command()
    except (ValueError, OSError, KeyError, BaseContextualError) as e:
        text = e.args[0] if isinstance(e, KeyError) and e.args else e
        sys.exit(f'error: {text}')
    except KeyboardInterrupt:
        sys.exit('stopped; run the same command again to go on')
