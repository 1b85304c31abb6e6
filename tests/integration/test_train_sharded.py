"""Sharded checkpoints of two ranks: small, resumed to the last bit and exported, also those whose metadata is in Composer's own form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmfoundry.checkpoint.composer_to_hf import convert_checkpoint
from llmfoundry.checkpoint.reader import open_checkpoint
from llmfoundry.tokenizers.build import build_tokenizer
from tests.helpers.small_tokenizer import write_small_tokenizer
from tests.helpers.train_runs import make_data, run_script, tiny_config

STEPS, STOPPED_AT = 12, 5
# Per config: the whole run; a run that stops early; what a kill during the next save leaves; the same command again. The second stopped run saves as Composer would.
RUN_ALL = """
import json, shutil, sys
from pathlib import Path
from llmfoundry import dist
from llmfoundry.models.composer_base import BaseHuggingFaceModel
from tests.helpers.train_runs import run_config, train_losses

def in_composers_form(self):
    self.metadata_form = 'parsed'
    return ours(self)

def leave_a_half_written_checkpoint(folder):
    shutil.copytree(folder / 'ep0-ba5', folder / 'ep0-ba6')
    (folder / 'ep0-ba6/.metadata').unlink()
    (folder / 'latest-sharded-rank0').unlink()
    (folder / 'latest-sharded-rank0').symlink_to('ep0-ba6')

ours, job, losses = BaseHuggingFaceModel.get_metadata, json.load(open(sys.argv[1])), {}
for name, config in job['configs'].items():
    folder = Path(job['folder']) / name
    saving = [f'save_folder={folder}', f'run_name={name}', 'save_interval=5ba']
    losses[name] = {'whole': train_losses(run_config(config))}
    BaseHuggingFaceModel.get_metadata = in_composers_form if name == 'composer' else ours
    losses[name]['stopped'] = train_losses(run_config(config, f'max_duration={job["stopped_at"]}ba', *saving))
    BaseHuggingFaceModel.get_metadata = ours
    dist.on_rank_zero(lambda: leave_a_half_written_checkpoint(folder))
    losses[name]['resumed'] = train_losses(run_config(config, *saving))
if dist.get_global_rank() == 0:
    json.dump(losses, open(sys.argv[2], 'w'))
"""


@dataclass(frozen=True)
class Runs:
    folder: Path
    losses: dict[str, dict[str, list[float]]]
    output: str


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """``gpt2``: the shipped tokenizer of 50,257 entries. ``composer``: one of 41, since Composer's form takes long to save."""
    make_data(folder / 'data')
    config = tiny_config(folder / 'data', max_duration=f'{STEPS}ba', fsdp_config={'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'FULL', 'state_dict_type': 'sharded'})
    return {'gpt2': config, 'composer': {**config, 'model': {**config['model'], 'vocab_size': 48}, 'tokenizer': {'name': write_small_tokenizer(folder / 'tokenizer')}}}


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp('sharded')
    (folder / 'job.json').write_text(json.dumps({'configs': _configs(folder), 'folder': str(folder), 'stopped_at': STOPPED_AT}))
    (folder / 'run_all.py').write_text(RUN_ALL)
    output = run_script(folder, folder / 'run_all.py', folder / 'job.json', folder / 'losses.json')
    return Runs(folder, json.loads((folder / 'losses.json').read_text()), output)


@pytest.mark.parametrize('name', ['gpt2', 'composer'])
def test_resumed_equals_uninterrupted(runs: Runs, name: str) -> None:
    """Stopped in mid-epoch, with dropout and Adam, and with the folder of a checkpoint that was never finished lying in the way."""
    losses = runs.losses[name]
    assert len(losses['whole']) == STEPS and len(losses['stopped']) == STOPPED_AT
    assert losses['stopped'] + losses['resumed'] == losses['whole']
    assert 'ep0-ba6 is damaged (its .metadata is missing)' in runs.output
    assert (runs.folder / name / 'damaged-ep0-ba6').is_dir()


def test_the_tokenizer_takes_one_value_per_file(runs: Runs) -> None:
    """With every entry of the vocabulary as a value of its own, .metadata takes 36 MB."""
    checkpoint = runs.folder / 'gpt2' / 'ep1-ba12'
    assert len(list(checkpoint.glob('*.distcp'))) == 2
    assert (checkpoint / '.metadata').stat().st_size < 200_000


def test_export_passes_the_gate(runs: Runs, tmp_path: Path) -> None:
    report = convert_checkpoint(str(runs.folder / 'gpt2' / 'ep1-ba12'), tmp_path / 'hf')
    assert report is not None
    assert json.loads((tmp_path / 'hf/config.json').read_text())['attn_config']['alibi'] is True
    shipped, exported = build_tokenizer('llmfoundry://gpt2', {}), AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert exported.get_vocab() == shipped.get_vocab() and exported.special_tokens_map == shipped.special_tokens_map
    assert exported('It is a truth universally acknowledged').input_ids == shipped('It is a truth universally acknowledged').input_ids


def test_both_forms_are_read_alike(runs: Runs) -> None:
    """The resumed run of the second config wrote our form over what it had read in Composer's."""
    with open_checkpoint(str(runs.folder / 'composer' / 'ep0-ba5')) as old, open_checkpoint(str(runs.folder / 'composer' / 'ep1-ba12')) as new:
        assert old.huggingface['tokenizer']['tokenizer.json']['content']['model'] == new.huggingface['tokenizer']['tokenizer.json']['content']['model']
        assert old.class_name == new.class_name == 'MPTForCausalLM'
        assert old.config['attn_config']['alibi'] is new.config['attn_config']['alibi'] is True
