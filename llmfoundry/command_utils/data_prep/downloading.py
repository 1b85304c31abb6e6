"""Iterates over remote text files, downloading each when its turn comes, so that a corpus larger than the disk can be converted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator, Sequence

__all__ = ['DownloadingIterable']


class DownloadingIterable:
    """Yields the local path of each object, downloaded at that moment.

    Args:
        object_names: keys in the store, in the order to yield them.
        output_folder: local folder for the downloads; sub-folders follow the keys.
        object_store: an object with ``download_object(object_name, filename)``, such as Composer's stores; None if the names are local paths.
    """

    def __init__(self, object_names: Sequence[str], output_folder: str | os.PathLike, object_store: Any | None) -> None:
        self.object_names = [str(name) for name in object_names]
        self.output_folder = Path(output_folder)
        self.object_store = object_store

    def __len__(self) -> int:
        return len(self.object_names)

    def __iter__(self) -> Iterator[str]:
        for name in self.object_names:
            if self.object_store is None:
                yield name
                continue
            target = self.output_folder / name.lstrip('/')
            target.parent.mkdir(parents=True, exist_ok=True)
            self.object_store.download_object(object_name=name, filename=str(target))
            yield str(target)
