"""The roots: ``ConfigError`` (one report for all problems of a config), ``DataError`` (a sample, its file and line), and the tree of contextual errors.

Contextual errors carry a ``location`` (which loader) and an ``error_attribution``, and survive pickling, so that a launcher can tell a user's mistake from ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable

USER_ERROR = 'UserError'
INTERNAL_ERROR = 'InternalError'
NETWORK_ERROR = 'NetworkError'
TRAIN_DATALOADER = 'TrainDataloader'
EVAL_DATALOADER = 'EvalDataloader'


@dataclass(frozen=True)
class ConfigProblem:
    """One thing that is wrong with a config.

    ``path`` is the dotted key (``train_loader.dataset.shufle``), ``message`` holds value seen, rule and remedy, ``line`` is the line of the YAML
    file ``source``; a key from the command line has no line and the source 'command line'.
    """

    path: str
    message: str
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        where = '' if self.source is None else f' ({self.source})' if self.line is None else f' ({self.source}:{self.line})'
        return f'{self.path}{where}: {self.message}'


class ConfigError(ValueError):
    """All problems of a config, one per line."""

    def __init__(self, problems: Iterable[ConfigProblem] | str, source: str | None = None) -> None:
        if isinstance(problems, str):
            problems = [ConfigProblem('config', problems)]
        self.problems: list[ConfigProblem] = list(problems)
        self.source = source
        count = f'{len(self.problems)} problem' + ('s' if len(self.problems) != 1 else '')
        head = f'{count} in {source}' if source else f'{count} in the config'
        super().__init__('\n'.join([f'{head}:', *(f'  {p}' for p in self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)


class DataError(ValueError):
    """A row or file that cannot be used, with the place where it is.

    Args:
        message: what is wrong and what to do about it.
        file: path of the input file.
        line: line of the file (1-based), or None.
        sample: index of the sample in its dataset, or None.
    """

    def __init__(self, message: str, file: str | None = None, line: int | None = None, sample: int | None = None) -> None:
        self.message, self.file, self.line, self.sample = message, file, line, sample
        where = file or ''
        if line is not None:
            where += f':{line}'
        if sample is not None:
            where += f' (sample {sample})'
        super().__init__(f'{where}: {message}' if where else message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.file, self.line, self.sample)


class BaseContextualError(Exception):
    """An error that knows which loader it came from and whose it is. Subclasses keep their constructor arguments, so they pickle."""

    location: str | None = None
    error_attribution: str | None = None

    def __init__(self, message: str = '', **context: Any) -> None:
        self.message = message
        self.context = context
        for key, value in context.items():
            setattr(self, key, value)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.context, self.location)


def _rebuild(cls: type[BaseContextualError], message: str, context: dict[str, Any], location: str | None) -> BaseContextualError:
    error = cls.__new__(cls)
    BaseContextualError.__init__(error, message, **context)
    error.location = location
    return error


class UserError(BaseContextualError):
    """Something in the user's config or data."""

    error_attribution = USER_ERROR


class InternalError(BaseContextualError):
    """A fault of ours."""

    error_attribution = INTERNAL_ERROR


class NetworkError(BaseContextualError):
    """A service that could not be reached."""

    error_attribution = NETWORK_ERROR
