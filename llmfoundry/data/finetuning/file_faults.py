"""Why a data file cannot be read: by file, line and column, found by reading it once more after ``datasets`` has given up.

``datasets`` reads JSON in chunks with Arrow, whose errors count rows within a chunk or name no place at all; and an empty file or one that is not UTF-8 ends in an error about something else.
"""

from __future__ import annotations

import json
import os
from typing import Any, Iterator, Mapping

__all__ = ['fault_of', 'first_fault', 'local_files']

_SHOWN_CHARS = 60
_JSON_EXTENSIONS = ('.json', '.jsonl')
_KINDS = {type(None): 'null', bool: 'a boolean', int: 'a number', float: 'a number', list: 'an array', str: 'a string'}


def local_files(files: Any) -> Iterator[str]:
    """The single files in a ``data_files`` argument: text, lists and mappings of these."""
    if isinstance(files, Mapping):
        files = list(files.values())
    if isinstance(files, (list, tuple)):
        for inner in files:
            yield from local_files(inner)
    elif files:
        yield str(files)


def first_fault(files: Any) -> str | None:
    """What is wrong with the first bad file of a ``data_files`` argument; None if nothing can be found."""
    return next((fault for path in local_files(files) if (fault := fault_of(path))), None)


def fault_of(path: str) -> str | None:
    """What is wrong with one file, None if nothing can be found."""
    if not os.path.isfile(path):
        return None
    if os.path.getsize(path) == 0:
        return f'{path} is empty'
    if os.path.splitext(path)[1] not in _JSON_EXTENSIONS:
        return None
    with open(path, 'rb') as f:
        is_array = f.read(4096).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'[')
        f.seek(0)
        faults = (_fault_of_array(f.read()),) if is_array else (_fault_of_line(line, number) for number, line in enumerate(f, 1))
        fault = next(filter(None, faults), None)
    return None if fault is None else f'{path}{fault}'


def _fault_of_line(line: bytes, number: int) -> str | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line.rstrip(b'\r\n').decode('utf-8-sig' if number == 1 else 'utf-8'))
    except UnicodeDecodeError as e:
        return f':{number}: not UTF-8 (byte 0x{line[e.start]:02x} at byte {e.start} of the line). Re-encode the file'
    except json.JSONDecodeError as e:
        shown = line.decode().strip()
        return f':{number}: not JSON ({e.msg.removesuffix(" at")} at column {e.colno}): {shown[:_SHOWN_CHARS]}{"..." if len(shown) > _SHOWN_CHARS else ""}'
    return None if isinstance(row, dict) else f':{number}: a row must be a JSON object, got {_KINDS.get(type(row), type(row).__name__)}'


def _fault_of_array(data: bytes) -> str | None:
    try:
        json.loads(data.decode('utf-8-sig'))
    except UnicodeDecodeError as e:
        return f': not UTF-8 (byte 0x{data[e.start]:02x} at byte {e.start}). Re-encode the file'
    except json.JSONDecodeError as e:
        return f':{e.lineno}: not JSON ({e.msg.removesuffix(" at")} at column {e.colno})'
    return None
