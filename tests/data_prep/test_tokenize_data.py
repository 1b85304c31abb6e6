"""Document 004's tokenising: ids, labels and counts against the slow and obvious way, flat memory, nothing half-written, bad rows by line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from llmfoundry.command_utils.data_prep import readers
from llmfoundry.command_utils.data_prep.tokenize_data import main, tokenize_data
from llmfoundry.errors import DataError, InvalidDatasetError
from tests.helpers.prepared_data import GPT2, gpt2_tokenizer, random_texts

ROOT = Path(__file__).resolve().parents[2]
PAIRS = list(zip(random_texts(120, seed=1, words=60), [text or 'x' for text in random_texts(120, seed=2, words=60)], strict=True))


def write_pairs(path: Path, pairs=PAIRS) -> Path:
    path.write_text(''.join(json.dumps({'prompt': p, 'generation': g, 'source': 'other columns are ignored'}) + '\n' for p, g in pairs), encoding='utf-8')
    return path


def read_arrow(path: Path) -> tuple[list[list[int]], list[list[int]], int]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        assert reader.schema == pa.schema([('input_ids', pa.list_(pa.int32())), ('labels', pa.list_(pa.int32()))])
        table = reader.read_all()
        return table['input_ids'].to_pylist(), table['labels'].to_pylist(), reader.num_record_batches


def expected_rows(max_length: int, pairs=PAIRS) -> list[tuple[list[int], list[int]]]:
    tokenizer, rows = gpt2_tokenizer(), []
    for prompt, generation in pairs:
        p, g = tokenizer.encode(prompt).ids, tokenizer.encode(generation).ids
        g = g if g[-1:] == [50256] else [*g, 50256]
        if generation and len(p) + len(g) <= max_length:
            rows.append((p + g, [-100] * max(len(p), 1) + g[0 if p else 1 :]))
    return rows


@pytest.mark.parametrize('processes', [1, 2])
def test_ids_labels_and_counts(tmp_path, monkeypatch, capsys, processes):
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 4096)
    expected = expected_rows(150)
    summary = tokenize_data(str(write_pairs(tmp_path / 'in.jsonl')), str(tmp_path / 'new' / 'out.arrow'), GPT2, 150, processes)
    ids, labels, batches = read_arrow(tmp_path / 'new' / 'out.arrow')
    assert list(zip(ids, labels, strict=True)) == expected and batches > 4
    assert 0 < len(expected) < len(PAIRS)
    assert (summary.rows, summary.kept, summary.too_long, summary.engine) == (120, len(expected), 120 - len(expected), 'tiktoken')
    trained = sum(label != -100 for row in labels for label in row)
    assert (summary.tokens, summary.target_tokens) == (sum(map(len, ids)), trained)
    printed = capsys.readouterr().out
    assert f'{len(expected)} of 120 rows, {summary.tokens:,} tokens ({trained:,} of them trained)' in printed
    assert f'{120 - len(expected)} rows were left out: {120 - len(expected)} longer than 150 tokens' in printed
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['out.arrow']


def test_a_row_of_exactly_max_length_is_kept_and_eos_is_not_doubled(tmp_path):
    pairs = [('a b', ' c d'), ('a b', ' c d e'), ('a', ' b<|endoftext|>'), ('', 'x'), ('prompt', '')]
    summary = tokenize_data(str(write_pairs(tmp_path / 'in.jsonl', pairs)), str(tmp_path / 'o.arrow'), GPT2, 5, 1)
    ids, labels, _ = read_arrow(tmp_path / 'o.arrow')
    assert (summary.kept, summary.too_long, summary.empty) == (3, 1, 1)
    assert len(ids[0]) == 5 and labels[0][:2] == [-100, -100] and ids[0][-1] == 50256
    assert ids[1].count(50256) == 1 and ids[1][-1] == 50256
    # Nothing predicts the first token of a row; without a prompt its label is left out, so that labels can be told from a response.
    assert len(ids[2]) == 2 and labels[2] == [-100, ids[2][1]]


@pytest.mark.parametrize('pack', [('a.jsonl.gz', gzip.compress), ('a.json', lambda d: b'[' + b',\n'.join(d.splitlines()) + b']'), ('a.txt', bytes)], ids=lambda p: p[0])
def test_other_forms_of_input_give_the_same_file(tmp_path, pack):
    whole = tmp_path / 'whole.arrow'
    plain = write_pairs(tmp_path / 'in.jsonl')
    tokenize_data(str(plain), str(whole), GPT2, 150, 1)
    (tmp_path / pack[0]).write_bytes(pack[1](plain.read_bytes()))
    tokenize_data(str(tmp_path / pack[0]), str(tmp_path / 'other.arrow'), GPT2, 150, 1, use_tiktoken=False)
    assert read_arrow(tmp_path / 'other.arrow')[:2] == read_arrow(whole)[:2]


def bos_tokenizer(folder: Path) -> str:
    """Word-level; puts BOS before every text, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({'<unk>': 0, '<s>': 1, '</s>': 2, 'a': 3, 'b': 4}, unk_token='<unk>'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(['<s>', '</s>', '<unk>'])
    inner.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token='<s>', eos_token='</s>', unk_token='<unk>').save_pretrained(folder)
    return str(folder)


def test_one_bos_per_row(tmp_path):
    source = write_pairs(tmp_path / 'in.jsonl', [('a a', 'b'), ('a', 'b </s>')])
    summary = tokenize_data(str(source), str(tmp_path / 'o.arrow'), bos_tokenizer(tmp_path / 'tokenizer'), 16, 1)
    assert read_arrow(tmp_path / 'o.arrow')[:2] == ([[1, 3, 3, 4, 2], [1, 3, 4, 2]], [[-100, -100, -100, 4, 2], [-100, -100, 4, 2]])
    assert summary.engine == 'tokenizers'


def test_a_tokenizer_written_in_python(tmp_path, capsys):
    """ByT5 has no fast form: ids are bytes + 3, and it ends every text with EOS itself."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / 'byt5')
    source = write_pairs(tmp_path / 'in.jsonl', [('ab', 'é')])
    assert tokenize_data(str(source), str(tmp_path / 'o.arrow'), str(tmp_path / 'byt5'), 16, 1).engine == 'python'
    target = [byte + 3 for byte in 'é'.encode()] + [1]
    assert read_arrow(tmp_path / 'o.arrow')[:2] == ([[100, 101, 1, *target]], [[-100, -100, -100, *target]])
    assert 'tokenising with python, not with the faster tiktoken: the tokenizer is written in Python.' in capsys.readouterr().out


BAD_ROWS = [
    (b'{"prompt": "a"}', "no 'generation' field; the row has 'prompt'"),
    (b'{"text": "a"}', "no 'prompt' field; the row has 'text'"),
    (b'{"prompt": "a", "generation": 5}', "'generation' must be a string, got a number"),
    (b'{"prompt": null, "generation": "b"}', "'prompt' must be a string, got null"),
    (b'{"prompt": "a", "generation": "\\ud800"}', "'generation' holds half of a surrogate pair (\\ud800 at character 0), which is no Unicode text"),
    (b'["a", "b"]', "a row must be a JSON object with 'prompt' and 'generation', got an array"),
    (b'{"prompt": "a", "generation": "b"', 'not JSON (Expecting \',\' delimiter at column 34): {"prompt": "a", "generation": "b"'),
    (b'{"prompt": "caf\xe9", "generation": "b"}', 'not UTF-8 (byte 0xe9 at byte 15 of the line)'),
]


@pytest.mark.parametrize(('row', 'message'), BAD_ROWS, ids=[m[:30] for _, m in BAD_ROWS])
def test_a_bad_row_is_named_by_its_line_and_nothing_is_written(tmp_path, row, message):
    source = write_pairs(tmp_path / 'in.jsonl', PAIRS[:3])
    source.write_bytes(source.read_bytes() + b'\n' + row + b'\n')
    (tmp_path / 'out').mkdir()
    with pytest.raises(DataError) as e:
        tokenize_data(str(source), str(tmp_path / 'out' / 'o.arrow'), GPT2, 150, 1)
    assert str(e.value) == f'{source}:5: {message}. Repair or remove the row.'
    assert not list((tmp_path / 'out').iterdir())


def test_the_documented_command(tmp_path):
    """From the root of the checkout, as document 004 prints it; a bad row ends in exit code 1, one line, and no file."""
    source = write_pairs(tmp_path / 'train.jsonl')
    command = [sys.executable, './preparation/tokenize_data.py', '--input-file', str(source), '--output-file', str(tmp_path / 'o.arrow')]
    command += ['--tokenizer-path', str(ROOT / 'llmfoundry' / 'assets' / 'gpt2'), '--max-length', '150']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids, labels, _ = read_arrow(tmp_path / 'o.arrow')
    assert list(zip(ids, labels, strict=True)) == expected_rows(150)
    (tmp_path / 'bad.jsonl').write_text('{"prompt": "a", "generation": "b"}\n{"prompt": "a"}\n')
    command = [sys.executable, 'scripts/data_prep/preparation/tokenize_data.py', '-i', str(tmp_path / 'bad.jsonl'), '-o', str(tmp_path / 'bad.arrow'), '-t', GPT2, '-l', '150']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"error: {tmp_path}/bad.jsonl:2: no 'generation' field; the row has 'prompt'. Repair or remove the row."
    assert not list(tmp_path.glob('bad.arrow*'))


def test_after_a_kill_nothing_looks_whole_and_the_next_run_cleans_up(tmp_path):
    source = write_pairs(tmp_path / 'in.jsonl')
    code = (
        'import sys, time\nfrom llmfoundry.command_utils.data_prep import readers, tokenize_data\nreaders.BLOCK_BYTES = 2048\ntake = tokenize_data._take\n'
        "def slow(*args):\n    print('block', flush=True)\n    time.sleep(0.2)\n    return take(*args)\n"
        "tokenize_data._take = slow\ntokenize_data.tokenize_data(sys.argv[1], sys.argv[2], 'llmfoundry://gpt2', 150, 1)\n"
    )
    out = tmp_path / 'out' / 'o.arrow'
    process = subprocess.Popen([sys.executable, '-c', code, str(source), str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(3)] == ['block\n'] * 3
    with pytest.raises(DataError, match='o.arrow: another process is writing this file. Wait for it, or choose another place'):
        tokenize_data(str(source), str(out), GPT2, 150, 1)
    process.kill()
    process.wait()
    assert [p.name for p in out.parent.iterdir()] == ['o.arrow.partial']
    tokenize_data(str(source), str(out), GPT2, 150, 1)
    assert [p.name for p in out.parent.iterdir()] == ['o.arrow'] and len(read_arrow(out)[0]) == len(expected_rows(150))


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / 'o.arrow').write_bytes(b'earlier')
    (tmp_path / 'in.jsonl').write_text('{"prompt": "a", "generation": "b"}\nnot json\n')
    with pytest.raises(DataError):
        tokenize_data(str(tmp_path / 'in.jsonl'), str(tmp_path / 'o.arrow'), GPT2, processes=1)
    assert (tmp_path / 'o.arrow').read_bytes() == b'earlier'
    tokenize_data(str(write_pairs(tmp_path / 'in.jsonl')), str(tmp_path / 'o.arrow'), GPT2, processes=1)
    assert len(read_arrow(tmp_path / 'o.arrow')[0]) == 120


WRONG = [
    (['--max-length', '1'], '--max-length must be at least 2 (one token and EOS), got 1'),
    (['--processes', '0'], '--processes must be at least 1, got 0'),
    (['--input-file', '/no/such.jsonl'], '/no/such.jsonl: no such file or folder'),
    (['--tokenizer-path', 'llmfoundry://nope'], "the tokenizer 'llmfoundry://nope' could not be loaded"),
    (['--max-length', '2'], 'cannot be used: of 3 rows, 3 longer than 2 tokens, so nothing was written'),
    (['--output-file', '/proc/nothing/o.arrow'], '/proc/nothing/o.arrow: cannot write the output: No such file or directory'),
]


@pytest.mark.parametrize(('flags', 'message'), WRONG, ids=[' '.join(f[:1]) + str(i) for i, (f, _) in enumerate(WRONG)])
def test_wrong_arguments(tmp_path, flags, message):
    source = write_pairs(tmp_path / 'in.jsonl', [('two words', 'three more words')] * 3)
    with pytest.raises(SystemExit) as e:
        main(['-i', str(source), '-o', str(tmp_path / 'o.arrow'), '-t', GPT2, *flags])
    assert str(e.value).startswith('error: ') and message in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ['in.jsonl']


def test_empty_input_is_an_error(tmp_path):
    (tmp_path / 'in.jsonl').write_text('\n\n')
    with pytest.raises(InvalidDatasetError, match='of 0 rows, none is there'):
        tokenize_data(str(tmp_path / 'in.jsonl'), str(tmp_path / 'o.arrow'), GPT2, processes=1)


def test_remote_in_and_out(tmp_path):
    memory = fsspec.filesystem('memory')
    memory.store.clear()
    memory.put_file(str(write_pairs(tmp_path / 'in.jsonl')), '/pairs/in.jsonl')
    tokenize_data('memory://pairs/in.jsonl', 'memory://tokens/o.arrow', GPT2, 150, 1)
    memory.get_file('/tokens/o.arrow', str(tmp_path / 'o.arrow'))
    memory.store.clear()
    assert len(read_arrow(tmp_path / 'o.arrow')[0]) == len(expected_rows(150))


# VmHWM is the peak of one program; ru_maxrss would begin with that of the process that started it.
MEASURE = """
import re, sys
from pathlib import Path
from llmfoundry.command_utils.data_prep import pool, readers
from llmfoundry.command_utils.data_prep.tokenize_data import tokenize_data
readers.BLOCK_BYTES = 1 << 17
peaks, leave = [], pool.WorkerPool.__exit__
def peak_kb(pid):
    return re.search(r'VmHWM:\\s+(\\d+) kB', Path(f'/proc/{pid}/status').read_text()).group(1)
def measured(self, *exc):
    peaks.append(peak_kb(self._workers[0]._process.pid))
    leave(self, *exc)
pool.WorkerPool.__exit__ = measured
tokenize_data(sys.argv[1], sys.argv[2], 'llmfoundry://gpt2', 2048, 1)
print(peak_kb('self'), *peaks)
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads peaks of memory from /proc')
def test_memory_does_not_grow_with_the_file(tmp_path):
    """kB at the peak of this process and of its workers: 16 times the input, the same memory."""
    peaks = []
    for copies in (4, 64):
        lines = write_pairs(tmp_path / 'in.jsonl').read_bytes() * copies * 4
        (tmp_path / 'in.jsonl').write_bytes(lines)
        done = subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path / 'in.jsonl'), str(tmp_path / 'o.arrow')], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append([int(n) for n in done.stdout.split()[-2:]])
    growth_bytes = [(large - small) * 1024 for small, large in zip(*peaks, strict=True)]
    assert len(lines) > 15_000_000 and (tmp_path / 'o.arrow').stat().st_size > 1.5 * len(lines)
    assert all(growth < len(lines) / 2 for growth in growth_bytes), (peaks, len(lines))
    assert all(peak < 400_000 for peak in peaks[1]), peaks
