"""The real tokenizers that tests use: GPT-2 (shipped with the library), GPT-NeoX-20B, and SmolLM2 as the one with a chat template."""

from __future__ import annotations

import functools
import lzma
from pathlib import Path
from typing import Any

__all__ = ['SMOLLM2_TEMPLATE', 'gpt2_tokenizer', 'neox_tokenizer', 'save_tokenizer', 'smollm2_tokenizer']

_ASSETS = Path(__file__).resolve().parent.parent / 'assets'

# As SmolLM2-135M-Instruct has it.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def gpt2_tokenizer(**kwargs: Any) -> Any:
    """GPT-2: no chat template, bos = eos, no pad token."""
    from llmfoundry.tokenizers.build import build_tokenizer

    return build_tokenizer('llmfoundry://gpt2', kwargs)


def neox_tokenizer() -> Any:
    """GPT-NeoX-20B, 50,277 tokens: no chat template, no pad token."""
    from transformers import GPTNeoXTokenizerFast

    end = '<|endoftext|>'
    return GPTNeoXTokenizerFast(tokenizer_object=_read('gpt_neox_20b_tokenizer'), bos_token=end, eos_token=end, unk_token=end)


def smollm2_tokenizer() -> Any:
    """SmolLM2-135M-Instruct, 49,152 tokens: ChatML template with a default system message, eos = pad = ``<|im_end|>``."""
    from transformers import PreTrainedTokenizerFast

    # transformers 5 replaces the way in which a tokenizer of GPT-2's class splits text by GPT-2's own, which keeps digits together.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_read('smollm2_tokenizer'), bos_token='<|im_start|>', eos_token='<|im_end|>', unk_token='<|endoftext|>', pad_token='<|im_end|>', model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = SMOLLM2_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> str:
    """Writes the tokenizer as a Hugging Face folder and returns its path, for YAMLs."""
    tokenizer.save_pretrained(folder)
    return str(folder)


def _read(name: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_text(name))


@functools.cache
def _text(name: str) -> str:
    return lzma.decompress((_ASSETS / f'{name}.json.xz').read_bytes()).decode('utf-8')
