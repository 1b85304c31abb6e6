"""A progress line with share of the input, tokens/s and time left; on a terminal it is redrawn, in a log file it comes every 10 s."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ['Progress', 'human_bytes', 'human_time']


def human_bytes(count: float) -> str:
    """``1234567`` -> ``1.2 MB``."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.0f} {unit}' if unit == 'B' else f'{count:.1f} {unit}'
        count /= 1000
    return f'{count:.1f} TB'


def human_time(seconds: float) -> str:
    """``3700`` -> ``1:01:40``."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Progress:
    """Prints how far a conversion is.

    Args:
        name: what is being converted.
        total_bytes: size of the input, None if unknown.
        already_bytes: how much of it an earlier run has done, which must not count for the speed.
        stream: where to print; stderr by default.
    """

    def __init__(self, name: str, total_bytes: int | None, already_bytes: int = 0, stream: TextIO | None = None) -> None:
        self._name, self._total, self._already = name, total_bytes, already_bytes
        self._stream = stream or sys.stderr
        self._redraw = self._stream.isatty()
        self._interval = 0.2 if self._redraw else 10.0
        self._start = self._last = time.monotonic()
        self._width = 0

    def update(self, bytes_read: int, tokens: int, documents: int) -> None:
        """Prints if it is time to. ``tokens`` and ``documents`` count from this run's start."""
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._print(self.line(bytes_read, tokens, documents, now - self._start))

    def line(self, bytes_read: int, tokens: int, documents: int, elapsed: float) -> str:
        """The text of the progress line after ``elapsed`` seconds."""
        elapsed = max(elapsed, 1e-6)
        amount = f'{tokens / elapsed:,.0f} tokens/s' if tokens else f'{documents / elapsed:,.0f} documents/s'
        if not self._total:
            return f'{self._name}: {documents:,} documents, {amount}, {human_time(elapsed)} so far'
        share = min(bytes_read / self._total, 1.0)
        speed = (bytes_read - self._already) / elapsed
        left = human_time((self._total - bytes_read) / speed) if speed > 0 else '?'
        return f'{self._name}: {share:4.0%} of {human_bytes(self._total)}, {amount}, {left} left'

    def _print(self, text: str) -> None:
        if self._redraw:
            self._stream.write('\r' + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + '\n')
        self._stream.flush()

    def close(self) -> None:
        """Ends a redrawn line."""
        if self._redraw and self._width:
            self._stream.write('\n')
            self._stream.flush()
