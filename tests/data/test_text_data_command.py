"""The commands of the README's "Test the Dataloader", as they are typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mds import write_token_mds

ROOT = Path(__file__).resolve().parents[2]


def run(cwd: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '../../llmfoundry/data/text_data.py', *args], cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_documented_commands_print_five_batches(tmp_path: Path) -> None:
    write_token_mds(tmp_path / 'my-copy-c4' / 'val_small', [list(range(32))] * 20)
    scripts = ROOT / 'scripts' / 'train'
    data = str(tmp_path / 'my-copy-c4')
    local = run(scripts, '--local_path', data, '--split', 'val_small', '--tokenizer', 'llmfoundry://gpt2')
    assert local.returncode == 0, local.stderr
    lines = local.stdout.splitlines()
    assert [line for line in lines if 'Batch' in line] == [f'{"#" * 20} Batch {i} {"#" * 20}' for i in range(5)]
    assert lines[2:5] == [f'{key} torch.Size([2, 32]) torch.int64' for key in ('input_ids', 'attention_mask', 'labels')]
    assert sum('- Sample' in line for line in lines) == 10
    assert '!"#$%&' in local.stdout

    cache = tmp_path / 'cache-c4'
    streamed = run(scripts, '--local_path', str(cache), '--remote_path', data, '--split', 'val_small', '--tokenizer', 'llmfoundry://gpt2')
    assert streamed.returncode == 0 and streamed.stdout == local.stdout
    assert (cache / 'val_small' / 'index.json').exists()

    wrong = run(scripts, '--local_path', data, '--split', 'val', '--tokenizer', 'llmfoundry://gpt2')
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1] == f"error: {data}: local directory does not contain split 'val': its sub-folders are val_small; did you mean split: val_small?"


