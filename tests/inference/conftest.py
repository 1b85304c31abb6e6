"""One exported MPT, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfoundry.checkpoint.hf_folder import write_model_card
from llmfoundry.checkpoint.hub_export import portable_config, write_model_code
from tests.helpers.composer_checkpoints import gpt2_tokenizer
from tests.helpers.tiny_mpt import tiny_mpt


@pytest.fixture(scope='session')
def mpt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random MPT with the GPT-2 tokenizer, written without a checkpoint."""
    folder = tmp_path_factory.mktemp('inference') / 'mpt'
    model = tiny_mpt({'alibi': True}, vocab_size=50304, init_device='cpu')
    model.config.update(portable_config(model.config.to_dict()))
    model.save_pretrained(folder)
    write_model_code(folder)
    write_model_card(folder, 'mpt', True)
    gpt2_tokenizer().save_pretrained(folder)
    return folder
