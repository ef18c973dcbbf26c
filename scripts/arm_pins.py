"""Prints this package's dependencies and pytest's as `name==version`, as this Python has them.

scripts/check_arm.sh gives an emulated machine the same, so that both run the same code. Ends with
one line that names what is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print them on one line."""
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pins = []
    for requirement in wanted:
        name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0]
        try:
            pins.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{sys.executable} has no package {name}")
    print(*pins)


if __name__ == "__main__":
    main()
