"""Says which commands there are: each is a module of its own, as scanax.experiments.train."""

import sys
from pathlib import Path

from scanax.experiments import starting

starting.begin(__name__)


def main(args: list[str] | None = None) -> int:
    """0: help was asked for. 2: this is no command."""
    args = sys.argv[1:] if args is None else args
    if args in (["--help"], ["-h"]):
        print(f"usage: python -m scanax.experiments.COMMAND; commands: {', '.join(commands())}")
        return 0
    given = f"{args[0]!r} is not one" if args else "none is given"
    if args and args[0] in commands():
        given = f"a command is a module: python -m scanax.experiments.{args[0]}"
    about = f"python -m scanax.experiments.COMMAND --help; commands: {', '.join(commands())}"
    print(f"experiments: {given}; {about}", file=sys.stderr)
    return 2


def commands() -> list[str]:
    """The files beside this one that run by themselves."""
    here = Path(__file__)
    return [
        path.stem
        for path in sorted(here.parent.glob("*.py"))
        if path != here and 'if __name__ == "__main__"' in path.read_text("utf-8")
    ]


if __name__ == "__main__":
    sys.exit(main())
