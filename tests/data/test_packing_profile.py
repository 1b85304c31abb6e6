"""Profiling of packing ratios: what the numbers mean, which ratio is chosen, plug-in collators, and the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmfoundry.command_utils.profile_packing import main
from llmfoundry.data.packing import BinPackCollator, auto_packing_ratio, best_fit, profile_packing
from llmfoundry.data.packing_profile import integer_ratio, profile_ratio
from tests.helpers.finetuning_runs import write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loader_cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Examples of 5 to 45 tokens, 25 on average, in rows of 240."""
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
    rows = write_jsonl(tmp_path / 'train.jsonl', 400)
    kwargs = {'data_files': str(rows), 'cache_dir': str(tmp_path / 'hf')}
    dataset = {'hf_name': 'json', 'hf_kwargs': kwargs, 'split': 'train', 'max_seq_len': 240, 'decoder_only_format': True, 'shuffle': True, 'packing_ratio': 'auto'}
    return {'name': 'finetuning', 'dataset': dataset, 'num_workers': 2, 'drop_last': True}


def test_a_whole_ratio_never_needs_more_rows_than_there_are() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.9, 2000).astype(int), 5, 2048)
    ratio = integer_ratio(lengths, 8, 2048)
    assert ratio >= 6
    per_batch = 8 * ratio
    rows = [len(best_fit(lengths[start : start + per_batch], 2048)) for start in range(0, 2000 - per_batch + 1, per_batch)]
    assert max(rows) <= 8
    # One more example per row is too many for some batch.
    per_batch = 8 * (ratio + 1)
    assert max(len(best_fit(lengths[start : start + per_batch], 2048)) for start in range(0, 2000 - per_batch + 1, per_batch)) > 8
    assert integer_ratio([100] * 50, 4, 100) == 1 and integer_ratio([10] * 400, 4, 100) == 10
    assert integer_ratio([10] * 7, 4, 100) == 1, 'too few examples to fill a batch with two per row'
    assert integer_ratio([], 4, 100) == 1 and integer_ratio([500] * 40, 4, 100) == 1


def test_lengths_alone_give_what_the_collator_measures() -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 480).tolist()
    packer = BinPackCollator(lambda batch: batch, 4, 64, 0, 'right', max_leftover_bins_to_keep=1)
    for start in range(0, 480 - 16 + 1, 16):
        mask = (torch.arange(64) < torch.tensor(lengths[start : start + 16])[:, None]).long()
        packer.pack({'input_ids': mask, 'labels': mask, 'attention_mask': mask})
    profile = profile_ratio(lengths, 4, 64, 4.0, max_leftover_bins=1)
    assert profile.waste_percent == pytest.approx(100 * packer.waste) and packer.waste > 0
    assert profile.padding_percent == pytest.approx(100 * (1 - packer.efficiency))
    assert profile_ratio([5] * 3, 4, 64, 2.0) == (2.0, None, None)


def test_the_profile_of_a_loader_and_the_ratio_that_it_suggests(gpt2: Any, loader_cfg: dict[str, Any]) -> None:
    before, state = repr(loader_cfg), torch.get_rng_state()
    profiles = list(profile_packing(loader_cfg, gpt2, 1, 15, 8, 4))
    assert [p.packing_ratio for p in profiles] == [1, 3, 5, 7, 9, 11, 13, 15]
    wastes = [p.waste_percent for p in profiles]
    paddings = [p.padding_percent for p in profiles]
    assert wastes[:4] == [0] * 4 and wastes[-1] > 10 and paddings[0] > 80 and paddings[-1] < 3
    assert paddings[:4] == sorted(paddings[:4], reverse=True)
    ratio = auto_packing_ratio(loader_cfg, gpt2, 4, num_packing_ratios=15, max_ratio=15)
    assert 7 <= ratio <= 11
    assert repr(loader_cfg) == before and torch.equal(torch.get_rng_state(), state)


def test_short_rows_are_not_packed(gpt2: Any, loader_cfg: dict[str, Any]) -> None:
    loader_cfg['dataset']['max_seq_len'] = 100
    assert auto_packing_ratio(loader_cfg, gpt2, 4) == 1


class Doubtful(BinPackCollator):
    """A plug-in that packs nothing above two examples per row."""

    @property
    def waste(self) -> float:
        return 0.5 if self.n_packed_examples and self.n_total_tokens / self.n_packed_examples > 60 else 0.0


def test_a_plug_ins_collator_is_asked(gpt2: Any, loader_cfg: dict[str, Any]) -> None:
    assert auto_packing_ratio(loader_cfg, gpt2, 4, 8, 15, packing_collator_cls=Doubtful) == 1.0
    profiles = list(profile_packing(loader_cfg, gpt2, 1, 3, 2, 4, packing_collator_cls=Doubtful))
    assert [(p.packing_ratio, p.waste_percent) for p in profiles] == [(1.0, 0.0), (3.0, 50.0)]


@pytest.mark.parametrize(('low', 'high', 'error'), [(0.5, 2, 'the lowest packing ratio must be at least 1, got 0.5'), (3, 2, 'the highest packing ratio must be at least the lowest, 3, got 2')])
def test_ranges_that_make_no_sense(gpt2: Any, loader_cfg: dict[str, Any], low: float, high: float, error: str) -> None:
    with pytest.raises(ValueError) as e:
        profile_packing(loader_cfg, gpt2, low, high, 3, 4)
    assert str(e.value) == error


CONFIG = """\
variables: {{rows: {rows}}}
max_seq_len: 240
global_train_batch_size: 8
tokenizer: {{name: 'llmfoundry://gpt2'}}
train_loader:
  name: finetuning
  num_workers: 0
  dataset:
    hf_name: json
    hf_kwargs: {{data_files: '${{variables.rows}}', cache_dir: {cache}}}
    split: train
    max_seq_len: ${{max_seq_len}}
    decoder_only_format: true
    shuffle: true
"""


@pytest.mark.parametrize('form', ['plain', 'launch file'])
def test_the_command_prints_a_table(loader_cfg: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture, form: str) -> None:
    text = CONFIG.format(rows=loader_cfg['dataset']['hf_kwargs']['data_files'], cache=tmp_path / 'hf')
    if form == 'launch file':
        text = 'name: x\nparameters:\n' + ''.join(f'  {line}\n' for line in text.splitlines())
    path = tmp_path / 'c.yaml'
    path.write_text(text)
    assert main(['--yaml-path', str(path), '--num-devices', '2', '--min', '1', '--max', '13', '--num-packing-ratios', '4']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['packing_ratio', '%', 'padding', '%', 'waste']
    assert [line.split()[0] for line in lines[1:5]] == ['1.00', '5.00', '9.00', '13.00'] and lines[1].split()[2] == '0.00'
    assert lines[5].startswith('packing: true leaves ') and float(lines[5].split()[3]) < 3


@pytest.mark.parametrize(('arguments', 'error'), [
    (('--num-devices', '0'), 'error: --num-devices must be at least 1, got 0'),
    (('--min', '0.5'), 'error: --min must be at least 1, got 0.5'),
    (('--min', '4', '--max', '2'), 'error: --max must be at least --min, 4.0, got 2.0'),
    (('--num-packing-ratios', '0'), 'error: --num-packing-ratios must be at least 1, got 0'),
    (('--num-devices', '3'), 'error: global_train_batch_size 8 is not a multiple of --num-devices 3'),
    (('--yaml-path', '/nowhere.yaml'), 'error: 1 problem in the config:\n  --yaml-path: /nowhere.yaml: No such file or directory'),
])  # fmt: skip
def test_the_command_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], error: str) -> None:
    path = tmp_path / 'c.yaml'
    path.write_text(CONFIG.format(rows='x.jsonl', cache=tmp_path))
    assert main(['--yaml-path', str(path), '--num-devices', '2', '--min', '1', '--max', '3', *arguments]) == 1
    assert capsys.readouterr().out.strip() == error


def test_a_config_without_the_batch_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / 'c.yaml'
    path.write_text(CONFIG.format(rows='x', cache=tmp_path).replace('global_train_batch_size: 8\n', ''))
    assert main(['--yaml-path', str(path), '--num-devices', '2', '--min', '1', '--max', '3']) == 1
    assert 'global_train_batch_size: is missing' in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs() -> None:
    done = subprocess.run([sys.executable, str(ROOT / 'scripts/misc/profile_packing.py'), '--help'], capture_output=True, text=True, check=True)
    assert '--num-packing-ratios' in done.stdout
