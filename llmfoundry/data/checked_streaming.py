"""A StreamingDataset that looks at its files first, and whose errors name the file and the sample.

What Streaming leaves to chance is settled here, for every kind of sample: damaged, missing or truncated shards are found at the start, a failure in a download thread reaches every worker,
leftovers of dead jobs stand in nobody's way, and a checkpoint at the end of an epoch resumes with the order of the next one.
"""

from __future__ import annotations

import os
from typing import Any, Iterator, Mapping, Sequence

from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState

from llmfoundry.data import shard_checks
from llmfoundry.data import streams as stream_settings
from llmfoundry.data.network_faults import explain
from llmfoundry.data.shm_hygiene import SharedFailure, exclusive_start
from llmfoundry.errors import DataError

__all__ = ['CheckedStreamingDataset', 'one_line']


class CheckedStreamingDataset(StreamingDataset):
    """Base of the datasets of this package. A subclass says which columns it needs (``check_folder``) and what a sample becomes (``decode``).

    Args:
        streams: several sources, or None.
        **arguments: of StreamingDataset, ``local`` and ``remote`` among them, completed by ``streams.with_order_defaults`` and ``with_cache_folder``.

    Raises:
        DataError: (a ValueError) files that are missing, damaged or of the wrong kind, with the remedy.
    """

    def __init__(self, streams: Sequence[Stream] | None = None, **arguments: Any) -> None:
        self._hash_checked: set[int] = set()
        self._size_checked: set[int] = set()
        sources = [(s._local, s.remote, s.split or arguments.get('split')) for s in streams or ()] or [(arguments.get('local'), arguments.get('remote'), arguments.get('split'))]
        with exclusive_start(check=lambda: self._check_sources(sources)):
            try:
                super().__init__(streams=streams, **arguments)
            except Exception as e:  # each store's client has classes of its own
                raise self._explain_failed_start(e, sources) from e

    def check_folder(self, folder: str, index: Mapping[str, Any]) -> None:
        """Raises DataError where the columns of ``index`` are not what ``decode`` needs."""

    def decode(self, sample: dict[str, Any], path: str, position: int) -> Any:
        """The sample as the loader gets it.

        Args:
            sample: columns of the shard.
            path: of the shard, for messages.
            position: of the sample in the shard.
        """
        return sample

    def _check_sources(self, sources: Sequence[tuple[str | None, str | None, str | None]]) -> None:
        """Everything that can be seen in local files before Streaming opens them; sources are (local, remote, split)."""
        for local, remote, split in sources:
            local_only = stream_settings.is_local_only(remote, local)
            if local is None:
                continue
            if local_only:
                folder = shard_checks.check_local_folder(local, split)
            else:
                folder = os.path.join(local, split or '')
                if not os.path.isfile(os.path.join(folder, shard_checks.INDEX)):
                    continue
            index = shard_checks.read_index(folder)
            self.check_folder(folder, index)
            shard_checks.check_local_shards(folder, index, has_remote=not local_only)

    def _explain_failed_start(self, error: Exception, sources: Sequence[tuple[str | None, str | None, str | None]]) -> Exception:
        """What a failed constructor of Streaming means: damaged files first, then a remote without an index, else the error itself."""
        if isinstance(error, DataError):
            return error
        for local, remote, split in sources:
            folder = os.path.join(local or '', split or '')
            if local and os.path.isfile(os.path.join(folder, shard_checks.INDEX)):
                try:
                    shard_checks.read_index(folder)
                except DataError as e:
                    return e
            elif local and remote:
                where = f'{remote.rstrip("/")}/{split}' if split else remote
                return DataError(f'the index could not be read from there: {_cause(error, remote)}. Check `remote` and `split`, and that the folder holds {shard_checks.INDEX}', file=where)
        return error

    @staticmethod
    def folder_of(stream: Stream) -> str:
        """Where the shards of a stream are."""
        return os.path.join(stream.local, stream.split or '')

    def shard_path(self, shard_id: int) -> str:
        """Where the shard lies, or will lie when it is fetched."""
        return os.path.join(self.folder_of(self.streams[self.stream_per_shard[shard_id]]), self.shards[shard_id].raw_data.basename)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As Streaming's, but a failure is a DataError that names the file, and does not leave the shard marked as being prepared."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as e:
            self._shard_states[shard_id] = _ShardState.REMOTE
            if self._cache_filelock.is_locked:
                self._cache_filelock.release(force=True)
            stream = self.streams[self.stream_per_shard[shard_id]]
            source = f' from {stream.remote}' if stream.remote else ''
            failure = DataError(f'the shard could not be prepared{source}: {_cause(e, stream.remote)}', file=self.shard_path(shard_id))
            if hasattr(self, '_event'):
                self._event.publish(str(failure))
            raise failure from e
        path = self.shard_path(shard_id)
        if shard_id not in self._size_checked and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._size_checked.add(shard_id)
            problem = shard_checks.file_size_problem(path, self.shards[shard_id].raw_data.bytes)
            if problem:
                raise DataError(f'{problem}. Delete it, and it is fetched again; if that does not help, it is damaged where it comes from')

    def on_exception(self, future: Any) -> None:
        """Tells every worker of the node about the error of a download thread, which Streaming's version only prints.

        A thread that failed has not counted itself out, and where both have failed Streaming waits for them for ever: it is done here.
        """
        error = future.exception()
        if error is not None:
            self._iterator.on_exit()
            self._event.publish(str(error) if isinstance(error, DataError) else f'reading ahead failed: {type(error).__name__}: {one_line(error)}')

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(self, '_event'):
            # Made here and not in the constructor, since it cannot be pickled to workers that are spawned.
            self._event = SharedFailure(os.path.join(self._filelock_root, f'{self._shm_prefix_int:06d}_failure'))
        yield from super().__iter__()
        # Streaming ends the epoch early, as if the data were used up, when a download thread fails.
        if self._event.is_set():
            raise DataError(self._event.reason())

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """The sample with this index over all shards, decoded."""
        shard_id, position = self.spanner[sample_id]
        try:
            sample = super().get_item(sample_id, retry)
        except DataError:
            raise
        except (OSError, ValueError, IndexError, RuntimeError, KeyError, TypeError) as e:
            if hasattr(self, '_event') and self._event.reason():
                raise DataError(self._event.reason()) from e
            raise DataError(f'cannot be read: {type(e).__name__}: {one_line(e)}', file=self.shard_path(shard_id), sample=int(position)) from e
        if shard_id not in self._hash_checked:
            self._check_hash(shard_id)
        return self.decode(sample, self.shard_path(shard_id), int(position))

    def _check_hash(self, shard_id: int) -> None:
        """Streaming compares hashes of downloads only, and if ``validate_hash`` is set; here also what lay in `local` already is compared, once per process.

        Without the setting, a hash that the index holds is compared where that costs next to nothing (several GB/s): a flipped bit would be trained on without a sign.
        """
        hashes = self.shards[shard_id].raw_data.hashes
        algorithm = self.streams[self.stream_per_shard[shard_id]].validate_hash or next((name for name in shard_checks.FAST_HASHES if name in hashes), None)
        if algorithm:
            shard_checks.check_hash(self.shard_path(shard_id), {'hashes': hashes}, algorithm)
        self._hash_checked.add(shard_id)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """As Streaming's. At the end of an epoch, where Composer counts from 0 again, it names the next epoch; Streaming's names the one that is over, and would repeat its order."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0 and state['epoch'] == self.next_epoch - 1:
            state['epoch'] += 1
        return state


def _cause(error: Exception, remote: str | None) -> str:
    """What an error of Streaming or of a store's client means, without a full stop."""
    explained = explain(error, remote, 'remote') if remote and '://' in remote and not isinstance(error, ValueError) else None
    return explained.rstrip('.') if explained else f'{type(error).__name__}: {one_line(error)}'


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    return ' '.join(str(error).split())
