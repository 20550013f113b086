"""Filling a page's template, and how numbers read on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manyheads.data.files import write_atomically


def write_page(template: str, folder: str | Path, **content: Any) -> Path:
    """Render a template of this room to ``folder/index.html`` and return that path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("manyheads.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(data=_data, percent=percent, setting=setting)
    return write_atomically(Path(folder) / "index.html", environment.get_template(template).render(**content))


def percent(fraction: float | int) -> str:
    """0.333 -> "33 %"."""
    return f"{100 * fraction:.0f} %"


def bytes_text(count: float | int) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def number_text(value: float | int) -> str:
    """Three or four digits that mean something: 8.337 -> "8.34", 1234.5 -> "1,234"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def setting(value: Any) -> str:
    """A setting as one short line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        text = ", ".join(setting(item) for item in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{name} {setting(item)}" for name, item in value.items())
    else:
        text = "default" if value is None else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _data(value: Any) -> Any:
    import markupsafe

    # "</script>" inside a token's text must not end the script element.
    return markupsafe.Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))
