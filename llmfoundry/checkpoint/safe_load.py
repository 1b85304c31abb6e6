"""Reads Composer ``.pt`` files without running code from them and without copying them into memory.

``torch.load(weights_only=True)`` refuses a Composer checkpoint, since its training clock holds ``datetime.timedelta``; the usual way out, free unpickling,
executes whatever the file says. Here a short list names every class that Composer's state needs, and anything else is refused by name.
The file is memory-mapped, so a tensor costs memory only while it is being read. The price: a callback of yours that stores objects of its own class must be
allowed explicitly (``extra_classes``, or the variable ``LLMFOUNDRY_SAFE_CLASSES``).
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import enum
import importlib
import os
import pathlib
import pickle
import re
import sys
from typing import IO, Any, Iterable, Iterator

import numpy as np
import torch
from torch.torch_version import TorchVersion

from llmfoundry.errors import CheckpointError, UnsafeCheckpointError

__all__ = [
    'SAFE_CLASSES_VARIABLE', 'allowed_classes', 'check_extra_classes', 'enum_member', 'load_checkpoint_file', 'load_item', 'refusal', 'refused_class', 'safe_classes',
]

SAFE_CLASSES_VARIABLE = 'LLMFOUNDRY_SAFE_CLASSES'

_REFUSED_GLOBAL = re.compile(r'GLOBAL (\S+) was not an allowed global')
# Training time as callbacks may store it. Allowed when met rather than beforehand, since importing Composer takes longer than reading most checkpoints.
_COMPOSER_CLASSES = {
    'composer.core.time.Time', 'composer.core.time.TimeUnit', 'composer.core.time.Timestamp', 'composer.core.precision.Precision',
}
_REFUSED_MODULE = re.compile(r'Trying to load unsupported GLOBAL (\S+) whose module (\S+) is blocked')


def _numpy_classes() -> list[Any]:
    """What a pickled array or scalar needs (the random state and metric counts), under the names of numpy 1 and 2."""
    # The public objects lead to the private functions, whose modules were renamed in numpy 2.
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    classes: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in '?bhilqBHILQefdSUO')]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        classes += [(reconstruct, f'{module}._reconstruct'), (scalar, f'{module}.scalar')]
    return classes


def enum_member(cls: Any, name: Any) -> enum.Enum:
    """Stands in for ``getattr`` while a checkpoint is read: Python before 3.11.4 pickles members of enums as ``getattr(Class, 'NAME')``. The class is on the list, or it would not be here.

    Raises:
        UnsafeCheckpointError: anything but a member of an enum is asked for, which could reach any code.
    """
    if isinstance(cls, type) and issubclass(cls, enum.Enum) and isinstance(name, str) and name in cls.__members__:
        return cls.__members__[name]
    raise UnsafeCheckpointError(f'it holds a call of getattr({cls!r}, {name!r}), which no checkpoint needs; it is refused, since reading it would run that code')


def safe_classes() -> list[Any]:
    """Everything beyond tensors and plain containers that a Composer checkpoint may hold, in the form of ``torch.serialization.safe_globals``."""
    composers = check_extra_classes(sorted(_COMPOSER_CLASSES)) if 'composer.core' in sys.modules else []
    return [
        *composers,
        (enum_member, 'builtins.getattr'),
        datetime.timedelta,
        datetime.datetime,
        TorchVersion,
        pathlib.PurePosixPath,
        pathlib.PosixPath,
        collections.deque,
        collections.defaultdict,
        dict,
        list,
        tuple,
        set,
        *_numpy_classes(),
    ]


def check_extra_classes(names: Iterable[str]) -> list[Any]:
    """Imports the classes that a user allows by name (``package.module.Class``).

    Raises:
        ValueError: a name that cannot be imported or is not a class. Functions are refused, since to allow one is to allow calling it.
    """
    found = []
    for name in names:
        module, _, attribute = name.rpartition('.')
        try:
            value = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as e:
            raise ValueError(f'{name!r} cannot be imported as package.module.Class: {e}') from e
        if not isinstance(value, type):
            raise ValueError(f'{name!r} is {value!r}; only classes may be allowed in a checkpoint')
        found.append(value)
    return found


@contextlib.contextmanager
def allowed_classes(extra_classes: Iterable[str] = ()) -> Iterator[None]:
    """Within it, ``torch.load(weights_only=True)`` accepts what Composer's state needs, ``extra_classes``, and the comma-separated names in ``LLMFOUNDRY_SAFE_CLASSES``.

    Raises:
        ValueError: a name that is no class; says where it came from.
    """
    named = [name.strip() for name in os.environ.get(SAFE_CLASSES_VARIABLE, '').split(',') if name.strip()]
    try:
        own = check_extra_classes(named)
    except ValueError as e:
        raise ValueError(f'{SAFE_CLASSES_VARIABLE}: {e}') from e
    with torch.serialization.safe_globals([*safe_classes(), *own, *check_extra_classes(extra_classes)]):
        yield


def load_item(file: IO[bytes], where: str, name: str) -> Any:
    """One item of a sharded checkpoint, read within ``allowed_classes``.

    Args:
        file: holds the item and nothing else.
        where: file and place, for messages.
        name: of the item.

    Raises:
        UnsafeCheckpointError: it is an object of a class that is not listed.
        CheckpointError: damaged.
    """
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except UnsafeCheckpointError as e:
        raise UnsafeCheckpointError(f'{where}: {name!r}: {e}') from e
    except pickle.UnpicklingError as e:
        refused = refused_class(e)
        if refused is None:
            raise CheckpointError(f'{where}: {name!r} is damaged. Cause: {str(e)[-300:]}') from e
        raise refusal(f'{where}: the value {name!r} is', refused) from e
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as e:
        raise CheckpointError(f'{where}: {name!r} is damaged. Cause: {type(e).__name__}: {e}') from e


def refusal(what: str, name: str) -> UnsafeCheckpointError:
    """The error about an object of the class ``name``, with the ways to allow it."""
    return UnsafeCheckpointError(
        f'{what} an object of {name}, which is not among the classes that a Composer checkpoint needs. Reading it would run that code, so the checkpoint is refused. '
        f'If you know where it comes from and {name} is a class of your own, allow it by name: {SAFE_CLASSES_VARIABLE}={name} in the environment (the scripts take --allow_class {name} too)',
    )


def load_checkpoint_file(path: str | os.PathLike, extra_classes: Iterable[str] = (), mmap: bool = True) -> dict[str, Any]:
    """The contents of a Composer checkpoint, tensors on the CPU and memory-mapped.

    Args:
        path: a local file written by Composer or ``torch.save``.
        extra_classes: names of further classes that the file may hold, for state of your own callbacks.
        mmap: map the file instead of reading it. Files older than torch 1.6's zip format are read whole in any case.

    Raises:
        FileNotFoundError: no such file.
        UnsafeCheckpointError: the file holds an object that is not on the list; names its class.
        CheckpointError: truncated, or not a checkpoint; names the size and the cause.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'No checkpoint file at {path!r}')
    size = os.path.getsize(path)
    allowed = set(extra_classes)
    with allowed_classes(allowed):
        try:
            loaded = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and _is_zip(path))
        except UnsafeCheckpointError as e:
            raise UnsafeCheckpointError(f'{path!r}: {e}') from e
        except pickle.UnpicklingError as e:
            refused = refused_class(e)
            if refused in _COMPOSER_CLASSES - allowed:
                return load_checkpoint_file(path, allowed | {refused}, mmap)
            raise _explain_refusal(path, e) from e
        except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as e:
            cause = str(e).partition('\n')[0]
            raise CheckpointError(
                f'{path!r} ({size:,} bytes) cannot be read as a checkpoint: it is truncated, damaged or another kind of file. Cause: {type(e).__name__}: {cause}. '
                'Compare its size with that of the original and copy it again.',
            ) from e
    if not isinstance(loaded, dict):
        raise CheckpointError(f'{path!r} holds a {type(loaded).__name__}, not the dictionary that Composer writes')
    return loaded


def _is_zip(path: str) -> bool:
    with open(path, 'rb') as f:
        return f.read(4) == b'PK\x03\x04'


def refused_class(error: pickle.UnpicklingError) -> str | None:
    """The class or function that torch's message says it refused."""
    match = _REFUSED_MODULE.search(str(error)) or _REFUSED_GLOBAL.search(str(error))
    return match.group(1) if match else None


def _explain_refusal(path: str, error: pickle.UnpicklingError) -> CheckpointError:
    """Turns torch's message into one that names the class and the remedy."""
    name = refused_class(error)
    if name is None:
        cause = re.sub(r'\s+', ' ', str(error)).strip()[-300:]
        return CheckpointError(f'{path!r} cannot be read as a checkpoint. Cause: {cause}')
    return refusal(f'{path!r} holds', name)
