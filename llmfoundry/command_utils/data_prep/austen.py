"""The corpus that ships with the package, Jane Austen's six novels, as training and held-out shards: ``llmfoundry data_prep austen``.

The last chapters of each novel, about 5 %, are held out: text of the same books that the model has not seen. Splitting by novel would measure how
unlike the books are instead. What is there already is left alone.
"""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

from llmfoundry.command_utils.data_prep.engine import say
from llmfoundry.command_utils.data_prep.options import TokenOptions, make_plan
from llmfoundry.command_utils.data_prep.outputs import convert_to
from llmfoundry.command_utils.data_prep.readers import FileSource, local_file
from llmfoundry.whole_files import write_whole

__all__ = ['austen_documents', 'prepare_austen']

_CORPUS = Path(__file__).resolve().parents[2] / 'assets' / 'austen' / 'austen.txt.xz'
_OPENINGS = {
    'Emma': 'Emma Woodhouse, handsome, clever, and rich',
    'Mansfield Park': 'About thirty years ago Miss Maria Ward',
    'Northanger Abbey': 'No one who had ever seen Catherine Morland',
    'Persuasion': 'Sir Walter Elliot, of Kellynch Hall',
    'Pride and Prejudice': 'It is a truth universally acknowledged',
    'Sense and Sensibility': 'The family of Dashwood had long been settled',
}
_CHAPTER = re.compile(r'^\s*chapter\s+[ivxlc\d]+\.?\s*$', re.IGNORECASE | re.MULTILINE)
_END = re.compile(r'^\s*(?:finis|the end)\s*$', re.IGNORECASE | re.MULTILINE)
HELD_OUT_SHARE = 0.05


def austen_documents() -> dict[str, list[dict[str, str]]]:
    """``{'train': rows, 'val': rows}``; a row is a chapter: its ``text`` and the title of its ``novel``."""
    corpus = lzma.decompress(_CORPUS.read_bytes()).decode('utf-8')
    starts = [corpus.index(opening) for opening in _OPENINGS.values()]
    splits: dict[str, list[dict[str, str]]] = {'train': [], 'val': []}
    for title, start, end in zip(_OPENINGS, starts, [*starts[1:], len(corpus)], strict=True):
        novel = corpus[start:end]
        closing = list(_END.finditer(novel))
        if closing:
            novel = novel[: closing[-1].start()]
        chapters = [c.strip() for c in _CHAPTER.split(novel) if len(c.strip()) > 200]
        held_out, size = len(chapters), 0
        while size < HELD_OUT_SHARE * len(novel):
            held_out -= 1
            size += len(chapters[held_out])
        for split, part in (('train', chapters[:held_out]), ('val', chapters[held_out:])):
            splits[split] += [{'novel': title, 'text': text + '\n'} for text in part]
    return splits


def prepare_austen(
    out_root: str, concat_tokens: int = 2048, tokenizer: str = 'llmfoundry://gpt2', eos_text: str = '<|endoftext|>', processes: int | None = None
) -> None:
    """Writes ``out_root/text/{train,val}.jsonl`` and the shards ``out_root/train`` and ``out_root/val``.

    Args:
        out_root: local folder.
        concat_tokens: tokens in a sample.
        tokenizer: name or folder.
        eos_text: text put after each chapter.
        processes: tokenising processes, None for one per core.

    Raises:
        ValueError: a split is there already, with samples of another length.
    """
    root = Path(out_root)
    documents: dict[str, list[dict[str, str]]] = {}
    for split in ('train', 'val'):
        folder, encoding = root / split, f'ndarray:int32:{concat_tokens}'
        if (folder / 'index.json').exists():
            found = json.loads((folder / 'index.json').read_text())['shards'][0]['column_encodings']
            if found != [encoding]:
                raise ValueError(
                    f'{folder} holds samples of the form {", ".join(found)}, not {encoding}: remove the folder or name another --out_root'
                )
            say(f'{split}: {folder} is there already')
            continue
        text = root / 'text' / f'{split}.jsonl'
        if not text.exists():
            documents = documents or austen_documents()
            text.parent.mkdir(parents=True, exist_ok=True)
            write_whole(text, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in documents[split]))
        plan = make_plan(split, tokenizer, concat_tokens, None, TokenOptions(eos_text=eos_text, processes=processes))
        convert_to(FileSource([local_file(str(text))], 'json'), plan, str(folder))
