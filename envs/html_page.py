"""Self-contained HTML pages from templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simtoreal.envs.files import atomic_path


def write_page(template: Path, values: Mapping[str, Any], path: Path) -> Path:
    """Fill a Jinja template and write it to ``path``, which is returned.

    Values are escaped unless the template says ``| safe``; a variable that ``values`` lacks is an error.

    Raises:
        OSError: the disk is full.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(template.read_text(encoding="utf-8")).render(values)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
