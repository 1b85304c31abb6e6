"""Formatted examples to token ids: many at once, by the same rules as one at a time.

A prompt/response pair is tokenised as ``tokenizer(text=prompt, text_target=response)`` would do it, a chat as the tokenizer's chat template renders it (see ``chat``). The texts of all examples go through the
Rust tokenizer in a few calls, on all cores, which is several times faster than one call per example; results and errors do not depend on how examples are grouped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

from llmfoundry.data.finetuning.chat import chat_turn_texts
from llmfoundry.data.finetuning.examples import (
    get_example_type,
    mark_row,
    messages_of,
    prompt_and_response,
    validate_chat_example,
    validate_prompt_response,
)
from llmfoundry.data.finetuning.pretokenized import is_pretokenized, pretokenized_turns, turn_of_ids, without_second_bos
from llmfoundry.data.finetuning.targets import stitch_example, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['TokenizedExample', 'is_valid_ift_example', 'tokenize_batch', 'tokenize_formatted_example']

TokenizedExample = dict[str, list[dict[str, list[int]]]]
"""``{'turns': [{'input_ids': ids of the prompt, 'attention_mask': ones, 'labels': ids of the response}, ...]}``."""

# Below this, starting threads costs more than it saves.
_MIN_TEXTS_FOR_THREADS = 32


def tokenize_formatted_example(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenizedExample:
    """Tokenises one example.

    Args:
        example: ``{prompt, response or completion}``, ``{messages}``, or what a tokenisation function returned (``input_ids`` and ``labels``).
        tokenizer: decides on special tokens of a pair; gives the chat template.

    Raises:
        UserError: one of the typed errors of ``examples``, ChatTemplateError or InvalidConversationError.
        DataError: (a ValueError) ids that are not the tokenizer's.
    """
    return tokenize_batch([example], tokenizer)[0]


def tokenize_batch(examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedExample]:
    """Tokenises many examples, each as ``tokenize_formatted_example`` does.

    Raises:
        UserError, DataError: as ``tokenize_formatted_example``, for the first bad example, whose index is the error's ``row``.
    """
    done: dict[int, list[dict[str, list[int]]]] = {}
    pairs: list[tuple[str, str]] = []
    chats: list[tuple[str, str]] = []
    owners: dict[int, tuple[list[tuple[str, str]], int, int]] = {}
    for row, example in enumerate(examples):
        try:
            if is_pretokenized(example):
                done[row] = pretokenized_turns(example, tokenizer)
                continue
            group, texts = _texts(example, tokenizer, pairs, chats)
        except Exception as e:
            mark_row(e, row)
            raise
        owners[row] = (group, len(group), len(texts))
        group.extend(texts)

    pair_turns = [turn_of_ids(p, without_second_bos(p, r, tokenizer.bos_token_id)) for p, r in _encode_pairs(pairs, tokenizer)]
    chat_turns = [turn_of_ids(p, r) for p, r in _encode_chats(chats, tokenizer)]
    for row, (group, start, count) in owners.items():
        done[row] = (pair_turns if group is pairs else chat_turns)[start : start + count]
    return [{'turns': done[row]} for row in range(len(examples))]


def is_valid_ift_example(max_seq_len: int, target_prompts: str, target_responses: str, decoder_only_format: bool, example: TokenizedExample) -> bool:
    """Whether an example trains something: no prompt and no response is empty, and a trained token is left within ``max_seq_len`` tokens.

    For encoder-decoder models, whose context and target are cut apart, length does not matter.
    """
    turns = example['turns']
    if any(len(turn['input_ids']) == 0 or len(turn['labels']) == 0 for turn in turns):
        return False
    ids, targets = stitch_example(turns, target_prompts, target_responses)
    if decoder_only_format:
        ids, targets = truncate(ids, targets, max_seq_len)
    return bool(targets.any())


def _texts(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    chats: list[tuple[str, str]],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The group that the example belongs to, and its (prompt, response) texts, one per turn."""
    if get_example_type(example) == 'chat':
        validate_chat_example(example)
        return chats, chat_turn_texts(messages_of(example), tokenizer)
    validate_prompt_response(example)
    return pairs, [prompt_and_response(example)]


def _encode_pairs(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int]]]:
    if not pairs:
        return iter(())
    prompts, responses = zip(*pairs, strict=True)
    backend = _plain_backend(tokenizer)
    if backend is None or not _same_for_targets(tokenizer):
        prompt_ids, response_ids = _ids(tokenizer(text=list(prompts), verbose=False)), _ids(tokenizer(text_target=list(responses), verbose=False))
    else:
        prompt_ids, response_ids = _encode_fast(backend, prompts, True), _encode_fast(backend, responses, True)
    return zip(prompt_ids, response_ids, strict=True)


def _encode_chats(chats: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int]]]:
    if not chats:
        return iter(())
    texts = [text for turn in chats for text in turn]
    backend = _plain_backend(tokenizer)
    if backend is None:
        ids = _ids(tokenizer(text=texts, add_special_tokens=False, verbose=False))
    else:
        ids = _encode_fast(backend, texts, False)
    return zip(ids[::2], ids[1::2], strict=True)


def _ids(encoding: Mapping[str, Any]) -> list[list[int]]:
    return encoding['input_ids']


def _encode_fast(backend: Any, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    with _all_cores(len(texts)):
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer, ready for use, where calling it does what calling ``tokenizer`` does; else None."""
    encoders = ('__call__', '_call_one', 'batch_encode_plus', '_batch_encode_plus', '_encode_plus')
    if not getattr(tokenizer, 'is_fast', False) or not all(_is_from_transformers(tokenizer, name) for name in encoders):
        return None
    backend = tokenizer.backend_tokenizer
    # An earlier call with truncation or padding leaves them switched on.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, 'split_special_tokens', False))
    return backend


def _is_from_transformers(tokenizer: Any, method: str) -> bool:
    owner = next((c for c in type(tokenizer).__mro__ if method in vars(c)), None)
    return owner is None or owner.__module__.partition('.')[0] == 'transformers'


def _same_for_targets(tokenizer: Any) -> bool:
    """Whether ``text_target`` is tokenised as ``text``: translation models switch the language there."""
    owner = next((c for c in type(tokenizer).__mro__ if '_switch_to_target_mode' in vars(c)), None)
    return owner is None or owner.__module__ == 'transformers.tokenization_utils_base'


class _Fork:
    """Whether this process was forked from one that may have started the tokenizer's threads: they do not exist here, and waiting for them would never end."""

    happened = False

    @classmethod
    def note(cls) -> None:
        cls.happened = True


os.register_at_fork(after_in_child=_Fork.note)


@contextlib.contextmanager
def _all_cores(num_texts: int) -> Iterator[None]:
    """Lets the tokenizer use threads, which ``build_tokenizer`` switches off because loader workers are forked."""
    if num_texts < _MIN_TEXTS_FOR_THREADS or _Fork.happened or multiprocessing.parent_process() is not None:
        yield
        return
    before = os.environ.get('TOKENIZERS_PARALLELISM')
    os.environ['TOKENIZERS_PARALLELISM'] = 'true'
    try:
        yield
    finally:
        if before is None:
            del os.environ['TOKENIZERS_PARALLELISM']
        else:
            os.environ['TOKENIZERS_PARALLELISM'] = before
