"""How a tokenizer's name becomes a tokenizer, and what is said when it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.errors import ConfigError
from llmfoundry.registry import save_registry, tokenizers
from llmfoundry.tokenizers import build_tokenizer, check_vocab, get_date_string
from llmfoundry.tokenizers.build import shipped_tokenizers
from tests.helpers.tokenizers import save_tokenizer, smollm2_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GPT2 = ROOT / 'llmfoundry' / 'assets' / 'gpt2'


def message(name: str, kwargs: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(name, kwargs or {})
    head, _, text = str(caught.value).partition('\n  ')
    assert head == '1 problem in the config:'
    return text


def test_the_shipped_tokenizer() -> None:
    tokenizer = build_tokenizer('llmfoundry://gpt2', {})
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    assert tokenizer('Hello world')['input_ids'] == [15496, 995]
    assert shipped_tokenizers() == ['gpt2']
    assert (os.environ['TRANSFORMERS_NO_ADVISORY_WARNINGS'], os.environ['TOKENIZERS_PARALLELISM']) == ('1', 'false')


@pytest.mark.parametrize(('kwargs', 'length'), [({}, int(1e30)), ({'model_max_length': 77}, 77)])
def test_model_max_length_is_the_users_or_none(kwargs: dict[str, Any], length: int) -> None:
    # GPT-2's own file says 1024, which would cap sequences silently.
    tokenizer = build_tokenizer(str(GPT2), kwargs)
    assert tokenizer.model_max_length == length


def test_kwargs_reach_the_tokenizer_and_are_not_changed() -> None:
    kwargs = {'pad_token': '<|endoftext|>'}
    assert build_tokenizer('llmfoundry://gpt2', kwargs).pad_token_id == 50256
    assert kwargs == {'pad_token': '<|endoftext|>'}


def test_errors_name_the_tokenizer_and_the_remedy(tmp_path: Path) -> None:
    assert message('llmfoundry://gtp2') == "tokenizer.name: 'llmfoundry://gtp2' is not shipped with this package (did you mean llmfoundry://gpt2?); shipped: llmfoundry://gpt2"
    assert message('./none') == "tokenizer.name: './none' looks like a path, but there is no such folder. Give a folder that holds tokenizer.json, or llmfoundry://gpt2"
    assert message('') == "tokenizer.name: '' is not a tokenizer name: give a local folder, a Hugging Face name, or llmfoundry://gpt2"
    (tmp_path / 'notes.txt').touch()
    assert message(str(tmp_path)).startswith(f"tokenizer.name: '{tmp_path}' is a folder, but no tokenizer could be loaded from it (it holds notes.txt). Cause: ")


def test_a_hub_name_that_cannot_be_reached() -> None:
    text = message('EleutherAI/gpt-neox-20b-not-here')
    assert text.startswith(
        "tokenizer.name: 'EleutherAI/gpt-neox-20b-not-here' is not a local folder, not in the tokenizers registry, and could not be loaded from the Hugging Face Hub: "
        'HF_HUB_OFFLINE is set, so only the local cache was searched. Give a local folder that holds tokenizer.json, use llmfoundry://gpt2 (shipped), or download it once where the Hub can be '
        'reached (`hf download EleutherAI/gpt-neox-20b-not-here`) and set HF_HUB_OFFLINE=1 here. Cause: OSError: '
    )


def test_a_tokenizer_without_eos() -> None:
    assert message('llmfoundry://gpt2', {'eos_token': None}) == (
        "tokenizer: 'llmfoundry://gpt2' has no eos_token, so the model could never learn where a text ends. Name one: tokenizer.kwargs.eos_token: '<|endoftext|>' (a token of its vocabulary)"
    )


def test_code_of_a_repository_runs_only_if_the_user_says_so(tmp_path: Path) -> None:
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / 'evil.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert message(str(tmp_path)) == f"tokenizer.name: '{tmp_path}' needs Python code from its repository. If you trust that code, set tokenizer.kwargs.trust_remote_code: true"
    assert not (tmp_path / 'ran').exists()


def test_registered_names_come_first() -> None:
    with save_registry():
        tokenizers.register('mine', func=lambda size: build_tokenizer('llmfoundry://gpt2', {'pad_token': '!' * size}))
        assert build_tokenizer('mine', {'size': 1}).pad_token == '!'


def test_vocabulary_smaller_than_the_tokenizer() -> None:
    tokenizer = build_tokenizer('llmfoundry://gpt2', {})
    check_vocab(tokenizer, 50257)
    check_vocab(tokenizer, 50368)
    with pytest.raises(ConfigError) as caught:
        check_vocab(tokenizer, 50256)
    assert str(caught.value) == (
        '1 problem in the config:\n  '
        "model.vocab_size: 50256 is smaller than the 50257 tokens of the tokenizer 'llmfoundry://gpt2': ids from 50256 on would have no embedding. "
        'Set it to at least 50257 (50304 is the next multiple of 128)'
    )


def test_date_string() -> None:
    assert re.fullmatch(r'\d\d (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) 20\d\d', get_date_string())


HOLDER = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX)
print('held', flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='no flock')
def test_local_processes_take_turns_and_a_killed_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    (tmp_path / 'hub').mkdir()
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path / 'hub')], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == 'held\n'
    code = 'from llmfoundry.tokenizers import build_tokenizer; build_tokenizer("llmfoundry://gpt2", {}); print("built")'
    env = {**os.environ, 'LOCAL_WORLD_SIZE': '2', 'HF_HUB_CACHE': str(tmp_path / 'hub')}
    waiting = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        # Both must see the turn being taken: it is not built while the lock is held, and built at once after its holder is killed.
        time.sleep(1)
        assert waiting.poll() is None
        holder.kill()
        holder.wait()
        out, _ = waiting.communicate(timeout=120)
        assert out == 'built\n' and waiting.returncode == 0
        assert list((tmp_path / 'hub').iterdir()) == []
    finally:
        holder.kill()
        waiting.kill()


def test_ids_with_gaps_count_up_to_the_highest() -> None:
    """A vocabulary of 3 tokens whose highest id is 9 needs 10 embeddings, and data may hold the id 9."""

    class Gapped:
        name_or_path = 'gapped'

        def __len__(self) -> int:
            return 3

        def get_vocab(self) -> dict[str, int]:
            return {'a': 0, 'b': 1, 'c': 9}

    check_vocab(Gapped(), 10)
    with pytest.raises(ConfigError, match='9 is smaller than the 10 tokens of the tokenizer'):
        check_vocab(Gapped(), 9)


@pytest.mark.parametrize('replaced', [False, True])
def test_a_tokenizer_that_is_not_what_its_file_says_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    """transformers 5 does this to SmolLM2 when its config names GPT-2's class: digits are no longer split."""
    import transformers
    from tokenizers import pre_tokenizers

    folder = save_tokenizer(smollm2_tokenizer(), tmp_path / 'smollm2')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if replaced:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained', lambda *_, **__: tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        build_tokenizer(folder)
    texts = [str(w.message) for w in caught if 'splits text otherwise' in str(w.message)]
    assert len(texts) == int(replaced)
    assert not replaced or ('smollm2' in texts[0] and 'PreTrainedTokenizerFast' in texts[0])
