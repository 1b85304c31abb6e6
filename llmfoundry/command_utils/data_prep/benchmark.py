"""Measures data preparation against the raw rates of ``tokenizers`` and tiktoken on the same text, on this machine, in the same run.

Each figure is taken in a process of its own, one after the other, best of ``--repeats``, so that none warms caches for the next or shares its
memory. The text is what every machine has: the shipped novels and the sources of Python's standard library and of installed packages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

from llmfoundry.command_utils.data_prep.austen import austen_documents
from llmfoundry.command_utils.data_prep.outputs import available_cores

__all__ = ['corpus', 'main', 'run_code', 'tree_memory_bytes']

_GPT2 = Path(__file__).resolve().parents[2] / 'assets' / 'gpt2'
_EOS = '<|endoftext|>'

_RAW = """
import json, sys, time
kind, path, folder, threads = sys.argv[1:5]
texts = [json.loads(line)['text'] for line in open(path, encoding='utf-8')]
from tokenizers import Tokenizer
backend = open(folder + '/tokenizer.json', encoding='utf-8').read()
if kind == 'tokenizers':
    tokenizer = Tokenizer.from_str(backend)
    encode = lambda part: sum(len(e) for e in tokenizer.encode_batch(part))
else:
    import tiktoken
    from llmfoundry.command_utils.data_prep.token_engines import plan_tiktoken
    plan = plan_tiktoken(json.loads(backend))
    encoding = tiktoken.Encoding('raw', pat_str=plan.pattern, mergeable_ranks=plan.ranks, special_tokens={})
    encode = lambda part: sum(map(len, encoding.encode_ordinary_batch(part, num_threads=int(threads))))
start, tokens = time.perf_counter(), 0
for i in range(0, len(texts), 1000):
    tokens += encode(texts[i:i + 1000])
print('RESULT', json.dumps({'tokens': tokens, 'seconds': time.perf_counter() - start}))
"""

_CONVERT = """
import json, os, sys, time
path, out, folder, concat, eos, processes = sys.argv[1:7]
start = time.perf_counter()
from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json_from_args
imported = time.perf_counter()
extra = {'processes': int(processes)} if processes != '0' else {}
convert_dataset_json_from_args(path=path, out_root=out, compression=None, concat_tokens=int(concat), split='train', tokenizer=folder, bos_text='', eos_text=eos, no_wrap=False, **extra)
print('RESULT', json.dumps({'seconds': time.perf_counter() - imported, 'import_seconds': imported - start}))
"""


def corpus(size_bytes: int) -> Iterator[str]:
    """Documents of about ``size_bytes`` in all: novels first, then Python sources in the order of their paths."""
    total = 0
    paths = sysconfig.get_paths()
    novels = (row['text'] for split in austen_documents().values() for row in split)
    for text in itertools.chain(novels, _sources(Path(paths['stdlib'])), _sources(Path(paths['purelib']))):
        if total >= size_bytes:
            return
        yield text
        total += len(text.encode())


def _sources(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in ('site-packages', '__pycache__'))
        for name in sorted(names):
            if name.endswith('.py'):
                try:
                    text = Path(folder, name).read_text(encoding='utf-8')
                except (UnicodeDecodeError, OSError):
                    continue
                if text.strip():
                    yield text


def tree_memory_bytes(pid: int) -> int:
    """Resident memory of a process and all below it (Linux). Shared pages count once for each, so this is an upper bound."""
    try:
        children = [int(c) for task in Path(f'/proc/{pid}/task').iterdir() for c in (task / 'children').read_text().split()]
        own = re.search(r'^VmRSS:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text(), re.MULTILINE)
    except OSError:
        return 0
    return (int(own.group(1)) * 1024 if own else 0) + sum(map(tree_memory_bytes, children))


def run_code(python: str, code: str, arguments: Sequence[Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs ``code`` in an interpreter and returns what its line RESULT says, with ``peak_bytes`` of the process tree."""
    peak = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # Not in the current folder: `python -c` would import the llmfoundry of a checkout there instead of the interpreter's own.
            [python, '-c', code, *map(str, arguments)], cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=errors,
            env={**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, **(environment or {})},
        )
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, tree_memory_bytes(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        output = process.communicate()[0].decode('utf-8', 'replace')
        done.set()
        watcher.join()
        found = [line for line in output.splitlines() if line.startswith('RESULT ')]
        if process.returncode != 0 or not found:
            errors.seek(0)
            raise RuntimeError(f'{python} ended with code {process.returncode}: {output[-500:]}{errors.read().decode("utf-8", "replace")[-1500:]}')
    return {**json.loads(found[-1][7:]), 'peak_bytes': peak}


def _count(folder: str) -> int:
    """Tokens in the shards of a folder."""
    index = json.loads(Path(folder, 'index.json').read_text())
    shape = index['shards'][0]['column_encodings'][0].split(':')
    samples = sum(shard['samples'] for shard in index['shards'])
    if len(shape) == 3:
        return samples * int(shape[2])
    return sum(shard['raw_data']['bytes'] for shard in index['shards']) // 4


def _measure(kind: str, arguments: argparse.Namespace, text: str, tokens: int) -> dict[str, Any]:
    """One figure: tokens/s, seconds and peak bytes of ``kind``."""
    if kind in ('tokenizers', 'tiktoken'):
        found = run_code(sys.executable, _RAW, (kind, text, _GPT2, arguments.processes), {'TOKENIZERS_PARALLELISM': 'true'})
        return {**found, 'rate': found['tokens'] / found['seconds']}
    python = arguments.peer if kind == 'peer' else sys.executable
    with tempfile.TemporaryDirectory(prefix='bench-', dir=arguments.folder) as folder:
        out = os.path.join(folder, 'out')
        found = run_code(python, _CONVERT, (text, out, _GPT2, arguments.concat_tokens, _EOS, 0 if kind == 'peer' else arguments.processes))
        found['written'] = _count(out)
    return {**found, 'rate': tokens / found['seconds']}


def _best(kind: str, arguments: argparse.Namespace, text: str, tokens: int) -> dict[str, Any]:
    runs = []
    for _ in range(arguments.repeats):
        runs.append(_measure(kind, arguments, text, tokens))
        print(
            f'  {kind:<11} {runs[-1]["rate"]:>12,.0f} tokens/s  {runs[-1]["seconds"]:7.2f} s  peak {runs[-1]["peak_bytes"] / 1e6:,.0f} MB', flush=True
        )
    best = min(runs, key=lambda run: run['seconds'])
    return {**best, 'peak_bytes': max(run['peak_bytes'] for run in runs)}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--megabytes', type=float, default=40, help='size of the text (default: %(default)s)')
    parser.add_argument('--concat_tokens', type=int, default=2048)
    parser.add_argument('--processes', type=int, default=available_cores(), help='default: one per core')
    parser.add_argument('--repeats', type=int, default=2, help='the best of so many runs counts')
    parser.add_argument(
        '--peer', default=None, help='a Python interpreter with another release of llmfoundry, whose converter is run on the same text'
    )
    parser.add_argument('--folder', default=None, help='where to put temporary files')
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix='bench-', dir=arguments.folder and os.path.abspath(arguments.folder)) as folder:
        text, size, documents = os.path.join(folder, 'text.jsonl'), 0, 0
        with open(text, 'w', encoding='utf-8') as f:
            for document in corpus(int(arguments.megabytes * 1e6)):
                f.write(json.dumps({'text': document}) + '\n')
                size, documents = size + len(document.encode()), documents + 1
        print(
            f'{size / 1e6:.1f} MB of text in {documents:,} documents, GPT-2 tokenizer, samples of {arguments.concat_tokens} tokens, {arguments.processes} processes',
            flush=True,
        )
        raw = _best('tokenizers', arguments, text, 0)
        # One EOS after each document.
        tokens = raw['tokens'] + documents
        found = {'tokenizers': raw, 'tiktoken': _best('tiktoken', arguments, text, 0), 'ours': _best('ours', arguments, text, tokens)}
        if arguments.peer:
            found['peer'] = _best('peer', arguments, text, tokens)
    _report(found)


def _report(found: dict[str, dict[str, Any]]) -> None:
    ours, raw = found['ours'], found['tokenizers']
    print(f"ours / tokenizers' encode_batch: {ours['rate'] / raw['rate']:.2f}   (aim: 0.9; 2.0 where tiktoken stands in)")
    print(f'ours / tiktoken raw:             {ours["rate"] / found["tiktoken"]["rate"]:.2f}')
    print(f'peak memory, all processes:      {ours["peak_bytes"] / 1e6:,.0f} MB   (aim: below 1000)')
    if 'peer' in found:
        peer = found['peer']
        print(
            f"ours / peer:                     {ours['rate'] / peer['rate']:.1f}   (peer's peak memory {peer['peak_bytes'] / 1e6:,.0f} MB, tokens written {peer['written']:,}, ours {ours['written']:,})"
        )
    print(json.dumps({kind: {k: round(v, 3) for k, v in run.items()} for kind, run in found.items()} | {'unix_time': int(time.time())}))


if __name__ == '__main__':
    main()
