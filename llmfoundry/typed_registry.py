"""A registry whose entries may be strings, resolved at first use.

``TypedRegistry`` maps a name to an object or to a ``'package.module:attribute'`` string. Strings are the point: naming every optimizer, callback
and model in one table costs no import, so ``import llmfoundry`` and ``llmfoundry validate`` stay free of torch and no import cycle
can arise. Plug-ins add entries with ``register`` (call or decorator) or with an installed entry point of the registry's group.

The interface (``register``, ``register_class``, ``get``, ``get_all``, ``get_entry_point``, ``get_entry_points``, ``find``) is the one that existing plug-ins use. The alternative,
``catalogue``, has no lazy entries, and one dependency fewer is one version knot fewer.

This file is part of the set that exported model folders carry, so it imports the standard library only.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import threading
from importlib import metadata
from typing import Any, Callable, Generic, Iterator, Mapping, TypeVar

__all__ = ['RegistryError', 'TypedRegistry', 'resolve_target']

T = TypeVar('T')


class RegistryError(ValueError):
    """A name that no entry answers to, or an entry whose target cannot be imported."""


def resolve_target(target: str) -> Any:
    """Imports ``'package.module:attribute'`` and returns the attribute.

    A target that starts with a dot is relative to this file's package, which lets exported folders use the same table.
    """
    module_name, _, attribute = target.partition(':')
    if not attribute:
        raise RegistryError(f"{target!r} is not of the form 'package.module:attribute'")
    package = __package__ if module_name.startswith('.') else None
    value: Any = importlib.import_module(module_name, package)
    for part in attribute.split('.'):
        value = getattr(value, part)
    return value


class TypedRegistry(Generic[T]):
    """Names of one kind of component.

    Args:
        namespace: path of the registry, for example ``('llmfoundry', 'optimizers')``; joined by ``_`` it is the entry-point group.
        generic_type: what the entries are, for readers and ``llmfoundry registry``; a string avoids the import.
        entry_points: whether installed entry points of the group ``llmfoundry_<name>`` count as entries.
        description: one or two sentences for ``llmfoundry registry get``.
        builtins: our own entries, name to target string.
        requires: name -> module that must be importable for the built-in entry to exist (``'te': 'transformer_engine'``).
    """

    def __init__(
        self,
        namespace: tuple[str, ...],
        generic_type: Any = None,
        entry_points: bool = True,
        description: str = '',
        builtins: Mapping[str, str] | None = None,
        requires: Mapping[str, str] | None = None,
    ) -> None:
        self.namespace = tuple(namespace)
        self.generic_type = generic_type
        self.entry_points = entry_points
        self.description = description
        self.entry_point_namespace = '_'.join(self.namespace)
        self._requires = dict(requires or {})
        self._entries: dict[str, Any] = dict(builtins or {})
        self._entry_point_cache: dict[str, metadata.EntryPoint] | None = None
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        return self.namespace[-1]

    @property
    def path(self) -> str:
        """The registry as error messages name it: ``llmfoundry -> optimizers``."""
        return ' -> '.join(self.namespace)

    def __repr__(self) -> str:
        return f'TypedRegistry({self.path!r}, {len(self.names())} entries)'

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """All names, sorted, without importing any target."""
        return sorted({n for n in self._entries if self._is_available(n)} | set(self.get_entry_points_raw()))

    def all_names(self) -> list[str]:
        """All names, sorted, with built-ins whose package is not installed here: a config may be checked on another machine than it runs on."""
        return sorted({*self._entries, *self.get_entry_points_raw()})

    def target(self, name: str) -> Any:
        """What is stored under ``name``: a target string that has not been imported, or the object itself."""
        if name in self._entries and self._is_available(name):
            return self._entries[name]
        entry_point = self.get_entry_points_raw().get(name)
        if entry_point is not None:
            return entry_point.value
        raise self.unknown_name_error(name)

    def register(self, name: str, *, func: Any = None) -> Any:
        """Registers ``func`` (an object or a target string) under ``name``; without ``func``, a decorator. A later entry replaces an earlier one."""
        if not isinstance(name, str) or not name:
            raise RegistryError(f'a name in the registry {self.path} must be a non-empty string, got {name!r}')

        def do_registration(value: Any) -> Any:
            with self._lock:
                self._entries[name] = value
                self._requires.pop(name, None)
            return value

        return do_registration if func is None else do_registration(func)

    def register_class(self, name: str) -> Callable[[type], type]:
        """Decorator form of ``register`` for classes."""
        return self.register(name)

    def __call__(self, name: str, func: Any = None) -> Any:
        return self.register(name, func=func)

    def get(self, name: str) -> T:
        """The entry, imported if it was a string.

        Raises:
            RegistryError: (a ValueError) for an unknown name, with the path of the registry, the nearest name and all names; or when
                the target of a known name cannot be imported, with the cause.
        """
        value = self._entries.get(name) if self._is_available(name) else None
        if value is None:
            return self.get_entry_point(name)
        if isinstance(value, str):
            try:
                value = resolve_target(value)
            except (ImportError, AttributeError) as e:
                raise RegistryError(f'{self.path}: the entry {name!r} points to {value!r}, which cannot be imported: {e}') from e
            with self._lock:
                self._entries[name] = value
        return value

    def get_all(self) -> dict[str, T]:
        """Every entry, imported."""
        return {name: self.get(name) for name in self.names()}

    def get_entry_points_raw(self) -> dict[str, metadata.EntryPoint]:
        """Installed entry points of this registry's group, not imported."""
        if not self.entry_points:
            return {}
        if self._entry_point_cache is None:
            self._entry_point_cache = {e.name: e for e in metadata.entry_points(group=self.entry_point_namespace)}
        return self._entry_point_cache

    def get_entry_points(self) -> dict[str, T]:
        """Installed entry points of this registry's group, imported."""
        return {name: self.get_entry_point(name) for name in self.get_entry_points_raw()}

    def get_entry_point(self, name: str, default: Any = None) -> Any:
        """The entry point called ``name``; ``default`` if given, else an error, when there is none."""
        entry_point = self.get_entry_points_raw().get(name)
        if entry_point is not None:
            return entry_point.load()
        if default is not None:
            return default
        raise self.unknown_name_error(name)

    def find(self, name: str) -> dict[str, Any]:
        """Where the entry is defined: ``module``, ``file``, ``line_no`` and ``docstring``."""
        value = self.get(name)
        target = inspect.unwrap(value) if callable(value) else value
        try:
            _, line_no = inspect.findsource(target)
            file = inspect.getsourcefile(target)
        except (OSError, TypeError):
            line_no, file = None, None
        docstring = inspect.getdoc(target)
        return {
            'module': getattr(target, '__module__', None),
            'file': file,
            'line_no': None if line_no is None else line_no + 1,
            'docstring': inspect.cleandoc(docstring) if docstring else None,
        }

    def unknown_name_error(self, name: str) -> RegistryError:
        """The error for a name that is not there, with the nearest name and the module that an optional entry lacks."""
        available = self.names()
        near = difflib.get_close_matches(str(name), available, n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        if name in self._requires and not self._is_available(name):
            hint = f' {name!r} needs the package {self._requires[name]!r}, which is not installed.'
        return RegistryError(f"Cannot find {name!r} in the registry {self.path}.{hint} Available names: {', '.join(available) or 'none'}")

    def _is_available(self, name: str) -> bool:
        module = self._requires.get(name)
        return module is None or _is_importable(module)

    def snapshot(self) -> dict[str, Any]:
        """A copy of the entries, for ``save_registry``."""
        return {'entries': dict(self._entries), 'requires': dict(self._requires)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what ``snapshot`` returned."""
        self._entries, self._requires = dict(state['entries']), dict(state['requires'])


def _is_importable(module: str) -> bool:
    """Whether the top-level package is installed, without importing it."""
    try:
        return importlib.util.find_spec(module.partition('.')[0]) is not None
    except (ImportError, ValueError):
        return False
