"""Warnings for what may change (``ExperimentalWarning``) and for what will go (``VersionedDeprecationWarning``)."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, TypeVar

__all__ = ['ExperimentalWarning', 'VersionedDeprecationWarning', 'experimental_class', 'experimental_function']

T = TypeVar('T')


class VersionedDeprecationWarning(UserWarning):
    """A feature that a named version will remove.

    Args:
        message: what is deprecated and what to use instead.
        remove_version: the version that removes it, or ``future`` (shown as "a future version").
    """

    def __init__(self, message: str, remove_version: str = 'future') -> None:
        when = 'a future version' if remove_version == 'future' else f'version {remove_version}'
        super().__init__(f'{message} It will be removed in {when}.')


class ExperimentalWarning(Warning):
    """A feature whose interface may change.

    Args:
        feature_name: the feature, as the message names it.
    """

    def __init__(self, feature_name: str) -> None:
        super().__init__(f'{feature_name} is experimental and may change with future versions.')


def experimental_function(feature_name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator: the function warns at each call."""

    def decorate(func: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> T:
            warnings.warn(ExperimentalWarning(feature_name), stacklevel=2)
            return func(*args, **kwargs)

        return wrapper

    return decorate


def experimental_class(feature_name: str) -> Callable[[type], type]:
    """Decorator: the class warns when it is instantiated."""

    def decorate(cls: type) -> type:
        original_init = cls.__init__

        @functools.wraps(original_init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            warnings.warn(ExperimentalWarning(feature_name), stacklevel=2)
            original_init(self, *args, **kwargs)

        cls.__init__ = __init__
        return cls

    return decorate
