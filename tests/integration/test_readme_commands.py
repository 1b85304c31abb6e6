"""Runs every command that the READMEs print, in order, as a reader would; the few exceptions are named here with their reason."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import datasets
import pytest

from tests.helpers.workspace import ROOT, make_workspace, run_command

BLOCK = re.compile(r'^```bash\n(.*?)^```', re.MULTILINE | re.DOTALL)
MAIN, DATA_PREP, BENCHMARKS = 'README.md', 'scripts/data_prep/README.md', 'scripts/train/benchmarking/README.md'
EXAMPLE = 'scripts/train/finetune_example/README.md'

# What stands in a README but cannot be run by a test, and why.
NOT_RUN = {
    'make test': 'it is what runs this file',
    'make finetune-demo': 'fetches 100 MB from the package index; its steps are tested on a tiny model in test_finetune_demo.py',
    "python scripts/data_prep/convert_dataset_hf.py --dataset c4 --data_subset en --out_root my-copy-c4 --splits train_small val_small --concat_tokens 2048 "
    "--tokenizer EleutherAI/gpt-neox-20b --eos_text '<|endoftext|>'": 'downloads from the Hub; the same script runs on a local folder in tests/data_prep',
    'python scripts/data_prep/convert_finetuning_dataset.py --dataset mosaicml/doge-facts --preprocessor my_data.formatting:dogefacts_prep_fn --splits train '
    '--out_root s3://my-bucket/my-copy-doge-facts': 'the dataset is made up; the same script runs on local files in tests/data_prep',
    'python scripts/data_prep/preparation/tokenize_data.py --input-file train.jsonl --output-file train.arrow --tokenizer-path EleutherAI/pythia-410m-deduped --max-length 2048':
        'downloads the tokenizer from the Hub; the same script runs with a local one in tests/data_prep',
    'python scripts/train/benchmarking/train_step.py --peer /path/to/other/python --rounds 3': 'the path is a placeholder; run below with this interpreter as the peer',
    'python scripts/train/benchmarking/finetuning_data.py --data train.jsonl --peer /path/to/other/python': 'the paths are placeholders; the benchmark has tests of its own',
    'python scripts/train/benchmarking/gpu.py --sizes 1b --compile 1 --no_tests': 'needs a CUDA GPU',
}
# Measurements are run on something tiny: a test shows that the command works, not how fast the machine is.
REDUCED = {
    'python scripts/train/benchmarking/train_step.py': f' --size tiny --batch_size 1 --seq_len 32 --steps 1 --rounds 1 --precisions fp32 --peer {sys.executable}',
    'python scripts/train/benchmarking/gpu.py': ' --device cpu --sizes tiny --attn sdpa --loss fused --compile 0 --seq_len 128 --steps 1 --no_tests',
    'python scripts/train/benchmarking/finetuning_data.py': ' --rows 300',
    'python scripts/data_prep/benchmarking/benchmark.py': ' --megabytes 1 --repeats 1',
}
NUMBER_OF_COMMANDS = {MAIN: 29, DATA_PREP: 8, BENCHMARKS: 6, EXAMPLE: 2}


def readme_commands(name: str) -> list[str]:
    """The lines of all bash blocks of a README, without comments."""
    blocks = BLOCK.findall((ROOT / name).read_text(encoding='utf-8'))
    lines = (line.split('   #')[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith('#')]


def test_every_readme_and_every_command_is_known() -> None:
    """A new README or command must be run here; the numbers are changed by hand so that none slips out of the pattern."""
    found = {str(p.relative_to(ROOT)) for folder in ('scripts', 'yamls', 'mcli') for p in (ROOT / folder).rglob('README.md')} | {MAIN}
    assert {name for name in found if 'train/yamls' not in name} == set(NUMBER_OF_COMMANDS)
    assert {name: len(readme_commands(name)) for name in NUMBER_OF_COMMANDS} == NUMBER_OF_COMMANDS
    every = [c for name in NUMBER_OF_COMMANDS for c in readme_commands(name)]
    assert set(NOT_RUN) <= set(every) and set(REDUCED) <= set(every)


def run_readme(name: str, workspace: Path) -> int:
    """Runs the commands of a README in ``workspace`` and returns how many."""
    ran = 0
    for command in readme_commands(name):
        if command in NOT_RUN:
            continue
        if command == 'make quickstart':
            check_quickstart(workspace)
        else:
            result = run_command(command + REDUCED.get(command, ''), workspace)
            assert result.returncode == 0, f'{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}'
        ran += 1
    return ran


@pytest.mark.slow
@pytest.mark.first
def test_main_readme(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / 'clone')
    assert run_readme(MAIN, workspace) == NUMBER_OF_COMMANDS[MAIN] - 2
    assert sorted(p.name for p in (workspace / 'my-hf-model').glob('*.safetensors')) == ['model.safetensors']


@pytest.mark.slow
def test_data_prep_readme(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / 'clone')
    (workspace / 'my-text.jsonl').write_text(''.join(json.dumps({'text': f'Row {i}: the quick brown fox jumps over the lazy dog. ' * 40}) + '\n' for i in range(20)))
    (workspace / 'books').mkdir()
    (workspace / 'books' / 'one.txt').write_text('It was the best of times, it was the worst of times. ' * 500)
    (workspace / 'chats.jsonl').write_text(json.dumps({'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}) + '\n')
    datasets.Dataset.from_list([{'input': f'{i}?', 'response': f'{i}!', 'contexts': []} for i in range(9)]).save_to_disk(str(workspace / 'my-rows'))
    yaml = re.search(r'```yaml\n(.*?)```', (ROOT / DATA_PREP).read_text(encoding='utf-8'), re.DOTALL)
    assert yaml is not None
    (workspace / 'my-dataprep.yaml').write_text(yaml[1])
    assert run_readme(DATA_PREP, workspace) == NUMBER_OF_COMMANDS[DATA_PREP] - 3
    assert (workspace / 'my-packed-rows' / 'state.json').exists() and (workspace / 'my-chats' / 'train' / 'index.json').exists()
    assert (workspace / 'my-text' / 'index.json').exists() and (workspace / 'books-mds' / 'index.json').exists()


@pytest.mark.slow
def test_finetune_example_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
    assert run_readme(EXAMPLE, ROOT / 'scripts' / 'train') == NUMBER_OF_COMMANDS[EXAMPLE]


@pytest.mark.slow
def test_benchmark_readme(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / 'clone')
    assert run_readme(BENCHMARKS, workspace) == NUMBER_OF_COMMANDS[BENCHMARKS] - 3


def check_quickstart(workspace: Path) -> None:
    """The whole quickstart with the environment that runs the tests: loss falls, the plot is a picture, a second run skips everything."""
    command = f'make quickstart VENV={sys.prefix} -o {sys.prefix}/.installed'
    first = run_command(command, workspace, timeout=900)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    match = re.search(r'validation loss: ([\d.]+) before training, ([\d.]+) after', first.stdout)
    assert match, first.stdout[-2000:]
    before, after = map(float, match.groups())
    assert 10.5 < before < 11.2
    assert after < 5.9
    assert (workspace / 'quickstart' / 'loss.png').read_bytes().startswith(b'\x89PNG')
    sample = (workspace / 'quickstart' / 'sample.txt').read_text()
    assert sample.startswith('It is a truth universally acknowledged') and len(sample) > 200

    second = run_command(command, workspace, timeout=120)
    assert second.returncode == 0
    assert second.stdout.count('already done') == 4
