"""OpenAI's tiktoken encodings as a Hugging Face tokenizer.

tiktoken works on bytes, Hugging Face on strings, so each byte gets a printable character (the table of GPT-2), and a token is the string of its bytes' characters. It is a
"slow" tokenizer in Hugging Face's sense (no Rust ``tokenizers`` object behind it), which costs a Python call per text; the alternative, converting the ranks to a ``tokenizer.json``, would
change ids where the merge order is ambiguous.

This file is copied into exported model folders (``register_for_auto_class``), so it imports nothing of this package but its neighbour ``utils``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizer

from .utils import get_date_string

if TYPE_CHECKING:
    import tiktoken

__all__ = ['CHATML_TEMPLATE', 'DEFAULT_SYSTEM_PROMPT', 'TiktokenTokenizerWrapper', 'bytes_to_unicode']

DEFAULT_SYSTEM_PROMPT = 'You are a helpful, respectful and honest assistant. If you do not know the answer to a question, say so instead of making one up.'

# ChatML, as OpenAI published it: <|im_start|>role\ncontent<|im_end|>\n. DEFAULT_SYSTEM is replaced by a Jinja string or by none. Every answer ends with the
# eos token too, since <|im_end|> need not be one token; after every answer and not only the last, so that a shorter conversation stays a prefix of a longer one.
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set turns = messages[1:] %}"
    '{% else %}{% set system_message = DEFAULT_SYSTEM %}{% set turns = messages %}{% endif %}'
    "{% if system_message is not none %}{{ '<|im_start|>system\\n' + system_message | trim + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in turns %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@functools.lru_cache(maxsize=1)
def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each of the 256 bytes.

    Printable Latin-1 characters stand for themselves, the others (control characters, spaces, the soft hyphen) for U+0100 and on, in order.
    Source: the byte-level BPE of GPT-2 (Radford et al., 2019).
    """
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    table = {byte: chr(byte) for byte in printable}
    shifted = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + position) for position, byte in enumerate(shifted)})
    return table


@functools.lru_cache(maxsize=1)
def _unicode_to_bytes() -> dict[str, int]:
    return {char: byte for byte, char in bytes_to_unicode().items()}


def _load_encoding(model_name: str | None, encoding_name: str | None) -> tiktoken.Encoding:
    """The tiktoken encoding, from TIKTOKEN_CACHE_DIR or the network.

    Raises:
        ValueError: unknown name.
        OSError: the vocabulary is neither cached nor can be downloaded.
    """
    import tiktoken

    try:
        return tiktoken.encoding_for_model(model_name) if model_name is not None else tiktoken.get_encoding(encoding_name)
    except (KeyError, ValueError) as e:
        what = f'model_name={model_name!r}' if model_name is not None else f'encoding_name={encoding_name!r}'
        raise ValueError(f'tiktoken knows no {what}; encodings: {", ".join(sorted(tiktoken.list_encoding_names()))}. Cause: {e}') from e
    except OSError as e:
        raise OSError(
            f'the vocabulary of the tiktoken encoding {encoding_name or model_name!r} could not be downloaded. Call tiktoken.get_encoding once where the network can be reached, with '
            f'TIKTOKEN_CACHE_DIR set to a folder, copy that folder here and set TIKTOKEN_CACHE_DIR to it. Cause: {type(e).__name__}: {e}',
        ) from e


class TiktokenTokenizerWrapper(PreTrainedTokenizer):
    """A tiktoken encoding behind the interface of a Hugging Face tokenizer.

    Args:
        model_name: an OpenAI model, whose encoding is used (``gpt-4``). Exactly one of it and ``encoding_name`` is given.
        encoding_name: a tiktoken encoding (``cl100k_base``).
        add_bos_token: put the bos token in front of every encoded text.
        add_eos_token: put the eos token behind every encoded text.
        use_default_system_prompt: the default chat template starts with ``DEFAULT_SYSTEM_PROMPT`` where a conversation has no system message.
        unk_token: stands for a token string that the vocabulary lacks.
        eos_token: end of text.
        bos_token: begin of text.
        pad_token: padding; none by default.
        errors: what to do with bytes that are not UTF-8 when decoding, as for ``bytes.decode``.
        **kwargs: passed to ``PreTrainedTokenizer``; ``chat_template`` replaces ChatML.

    Raises:
        ValueError: both or none of ``model_name`` and ``encoding_name``, or an unknown one.
        OSError: the vocabulary cannot be had offline.
    """

    model_input_names = ['input_ids', 'attention_mask']

    def __init__(
        self,
        model_name: str | None = None,
        encoding_name: str | None = None,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        use_default_system_prompt: bool = False,
        unk_token: str | None = '<|endoftext|>',
        eos_token: str | None = '<|endoftext|>',
        bos_token: str | None = '<|endoftext|>',
        pad_token: str | None = None,
        errors: str = 'replace',
        **kwargs: Any,
    ) -> None:
        if (model_name is None) == (encoding_name is None):
            raise ValueError(f'exactly one of model_name and encoding_name must be given, got model_name={model_name!r}, encoding_name={encoding_name!r}')
        self.model_name, self.encoding_name = model_name, encoding_name
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self.use_default_system_prompt = use_default_system_prompt
        self.errors = errors
        self._encoding: tiktoken.Encoding | None = _load_encoding(model_name, encoding_name)
        self._vocab_cache: dict[str, int] | None = None
        if kwargs.get('chat_template') is None:
            default_system = repr(DEFAULT_SYSTEM_PROMPT) if use_default_system_prompt else 'none'
            kwargs['chat_template'] = CHATML_TEMPLATE.replace('DEFAULT_SYSTEM', default_system)
        super().__init__(
            model_name=model_name,
            encoding_name=encoding_name,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            use_default_system_prompt=use_default_system_prompt,
            unk_token=unk_token,
            eos_token=eos_token,
            bos_token=bos_token,
            pad_token=pad_token,
            errors=errors,
            **kwargs,
        )

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding; loaded again in a process that received this tokenizer pickled."""
        if self._encoding is None:
            self._encoding = _load_encoding(self.model_name, self.encoding_name)
        return self._encoding

    def __getstate__(self) -> dict[str, Any]:
        # The encoding is a Rust object and the vocabulary a large dict; both are cheap to get back from their files.
        return {**self.__dict__, '_encoding': None, '_vocab_cache': None}

    @property
    def vocab_size(self) -> int:
        """Number of ids of the encoding, gaps included, tokens added later not included."""
        return self.encoding.n_vocab

    @property
    def is_fast(self) -> bool:
        return False

    def _base_vocab(self) -> dict[str, int]:
        if self._vocab_cache is None:
            strings = [self._convert_id_to_token(index) for index in range(self.vocab_size)]
            gaps = (index for index, string in enumerate(strings) if not string)
            for number, index in enumerate(gaps):
                strings[index] = f'<extra_id_{number}>'
            self._vocab_cache = {string: index for index, string in enumerate(strings)}
        return self._vocab_cache

    def get_vocab(self) -> dict[str, int]:
        """Token string -> id, without holes: an id that the encoding does not use is called ``<extra_id_N>``, N counting such ids from 0."""
        return {**self._base_vocab(), **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Token strings of ``text``; special tokens of the encoding written out in it become those tokens, as in other Hugging Face tokenizers."""
        return [self._convert_id_to_token(index) for index in self.encoding.encode(text, allowed_special='all')]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._base_vocab().get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        try:
            token_bytes = self.encoding.decode_single_token_bytes(index)
        except KeyError:
            return ''
        table = bytes_to_unicode()
        return ''.join(table[byte] for byte in token_bytes)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of token strings. Bytes that are not UTF-8 are treated as ``errors`` says."""
        table = _unicode_to_bytes()
        parts: list[bytes] = []
        for char in ''.join(tokens):
            # A token added by the user may hold characters that stand for no byte: they stand for themselves.
            parts.append(bytes([table[char]]) if char in table else char.encode('utf-8'))
        return b''.join(parts).decode('utf-8', errors=self.errors)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """``[bos] ids [eos]``, the same again for a second text."""
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        second = [] if token_ids_1 is None else [*bos, *token_ids_1, *eos]
        return [*bos, *token_ids_0, *eos, *second]

    def get_special_tokens_mask(self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False) -> list[int]:
        """1 where ``build_inputs_with_special_tokens`` adds a token, 0 elsewhere."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        bos, eos = [1] * self.add_bos_token, [1] * self.add_eos_token
        second = [] if token_ids_1 is None else [*bos, *([0] * len(token_ids_1)), *eos]
        return [*bos, *([0] * len(token_ids_0)), *eos, *second]

    def create_token_type_ids_from_sequences(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """All 0: the models have no segments."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, with ``date_string`` offered to the template."""
        kwargs.setdefault('date_string', get_date_string())
        return super().apply_chat_template(*args, **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes nothing: the encoding is known by its name."""
        return ()

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        # transformers 5 leaves these two out of tokenizer_config.json, its first file, because fast tokenizers keep them in tokenizer.json.
        path = Path(file_names[0])
        settings = {'add_bos_token': self.add_bos_token, 'add_eos_token': self.add_eos_token, **json.loads(path.read_text(encoding='utf-8'))}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


TiktokenTokenizerWrapper.register_for_auto_class()
