"""What transformers calls the key/value cache of a language model: ``cache`` since 5.24, ``past_key_values`` before.

Newer versions still take and return the old name, with a warning, but inside a model only one of them counts. So nobody
else in the library writes either.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def cache_keyword(model: Any) -> str:
    """The name under which this model's ``forward`` takes its cache.

    Raises:
        ValueError: it takes none.

    >>> class Old:
    ...     def forward(self, input_ids, past_key_values=None): ...
    >>> cache_keyword(Old())
    'past_key_values'
    """
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ValueError(f"{type(model).__name__}.forward takes no cache; tried {', '.join(CACHE_NAMES)}")


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands this cache (or None) to the model: ``model(ids, **with_cache(model, cache))``."""
    return {cache_keyword(model): cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model's call, under either name, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """The cache in a model's output, or None.

    >>> from types import SimpleNamespace
    >>> returned_cache(SimpleNamespace(past_key_values=3))
    3
    """
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)
