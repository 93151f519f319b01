"""Files that are whole at every moment."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """The whole file, or the one of before."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, path)
