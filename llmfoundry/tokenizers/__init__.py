"""Tokenizers: how a `tokenizer` block becomes a Hugging Face tokenizer, and the wrapper around OpenAI's tiktoken."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'TiktokenTokenizerWrapper': 'llmfoundry.tokenizers.tiktoken',
        'build_tokenizer': 'llmfoundry.tokenizers.build',
        'bytes_to_unicode': 'llmfoundry.tokenizers.tiktoken',
        'check_vocab': 'llmfoundry.tokenizers.build',
        'get_date_string': 'llmfoundry.tokenizers.utils',
    },
    ('build', 'tiktoken', 'utils'),
)
