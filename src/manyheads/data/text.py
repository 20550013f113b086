"""Real text that every Python installation has: the language's own documentation and licence."""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def python_documentation() -> str:
    """The help topics of the running Python in alphabetical order, then its licence; about 480,000 characters.

    The same installation gives the same text every time. Versions of Python differ a little.

    >>> python_documentation().startswith('The "assert" statement')
    True
    """
    return "\n\n".join(_documents())


def documentation_split(test_share: int | float = 0.1) -> tuple[str, str]:
    """(train, test) text of ``python_documentation``; no paragraph of the test text occurs in the train text.

    Args:
        test_share: share of the documents (help topics, licence) that goes to the test side, evenly spread.

    Raises:
        ValueError: a share outside (0, 1).

    >>> train, test = documentation_split()
    >>> len(train) > len(test) > 10_000
    True
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share} must lie strictly between 0 and 1")
    documents = _documents()
    # Document i is a test document where the running share of test documents passes a whole number.
    chosen = {i for i in range(len(documents)) if int((i + 1) * test_share) > int(i * test_share)}
    train = [text for i, text in enumerate(documents) if i not in chosen]
    # Topics repeat each other's sections, so the split is made clean paragraph by paragraph.
    seen = {paragraph for text in train for paragraph in text.split("\n\n")}
    test = ["\n\n".join(p for p in documents[i].split("\n\n") if p not in seen) for i in sorted(chosen)]
    return "\n\n".join(train), "\n\n".join(text for text in test if text)


def _documents() -> list[str]:
    from pydoc_data.topics import topics

    documents = [topics[name].strip() for name in sorted(topics)]
    # Linux distributions move the licence elsewhere; the help topics alone serve then.
    licence = Path(os.__file__).with_name("LICENSE.txt")
    if licence.is_file():
        documents.append(licence.read_text(encoding="utf-8").strip())
    return documents
