"""What pictures of one pair of axes share."""

import io
from typing import Any


def begun(title: str) -> tuple[Any, Any]:
    """A figure and its axes, with a grid."""
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
