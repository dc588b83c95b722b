"""Run by the web UI before it starts. Installs nothing, and never touches torch: the host's choice stays."""

import importlib.metadata
import runpy
from pathlib import Path

# By its file: importing the package would import torch, which takes seconds at every start.
say = runpy.run_path(str(Path(__file__).with_name("lib_subquad") / "console.py"))["say"]

OLDEST_TORCH = (2, 0)


def main() -> None:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        say("[subquad] torch is not installed; it needs torch 2.0 or newer.")
        return
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_TORCH:
        say(f"[subquad] torch {version} is too old: it needs 2.0 or newer. The web UI starts without it.")


if __name__ == "__main__":
    main()
