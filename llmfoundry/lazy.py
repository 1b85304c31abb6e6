"""Lazy re-exports (PEP 562), so that packages can offer names without importing what is behind them.

``python llmfoundry/data/text_data.py`` puts a sub-folder first on ``sys.path``; this file is named so that it shadows nothing there.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, Mapping, Sequence

__all__ = ['lazy_exports']


def lazy_exports(
    package: str,
    names: Mapping[str, str],
    submodules: Sequence[str] = (),
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns ``__getattr__``, ``__dir__`` and ``__all__`` for a package.

    Args:
        package: the package's ``__name__``.
        names: public name -> module that defines it, or ``'module:attribute'`` where the attribute has another name.
        submodules: names of sub-packages and modules that attribute access may import.
    """
    exported = [*names, *submodules]

    def __getattr__(name: str) -> Any:
        if name in names:
            module, _, attribute = names[name].partition(':')
            return getattr(importlib.import_module(module), attribute or name)
        if name in submodules:
            return importlib.import_module(f'{package}.{name}')
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    def __dir__() -> list[str]:
        return sorted(exported)

    return __getattr__, __dir__, exported
