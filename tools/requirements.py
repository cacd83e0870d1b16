"""Print what kvfs depends on, one requirement a line, for pip.

Layer: tool.

    python tools/requirements.py [EXTRA ...]     without EXTRA: run time alone

`make setup` installs these first, and kvfs itself without dependencies: an editable install without
build isolation would build pyfuse3 without isolation too, and with a venv's own old setuptools that
fails.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """Return run-time dependencies, or those of the extras where some are named."""
    project = tomllib.loads(pyproject)["project"]
    if not extras:
        return list(project["dependencies"])
    return [line for extra in extras for line in project["optional-dependencies"][extra]]


def main() -> int:
    """Print for the pyproject.toml above this file."""
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    sys.stdout.writelines(f"{line}\n" for line in requirements(text, sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
