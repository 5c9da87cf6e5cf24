"""Builds a wheel, installs it into an environment of its own, and uses it from another folder: run
by `make wheel-check`. Also installs the source folder without -e."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USE = """
import pydl, pydl.nn, pydl.functional, torch, sys
import pydl.kernels
assert "site-packages" in pydl.__file__ and "site-packages" in pydl.kernels.__file__, pydl.__file__
x = torch.randn(1000, requires_grad=True)
pydl.functional.mish(x, backend="cpu").sum().backward()
assert x.grad is not None
print("used", pydl.__file__)
"""


def run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd)


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        run(
            sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps",
            "-w", folder, ROOT
        )  # fmt: skip
        (wheel,) = folder.glob("pydl-*.whl")
        other = folder / "venv"
        venv.create(other, with_pip=True)
        python = other / "bin" / "python"
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        # The new environment sees this one's torch and Triton, but its own pydl.
        import torch

        here = Path(torch.__file__).parents[1]
        (Path(site) / "torch.pth").write_text(f"{here}\n")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
        run(python, "-c", USE, cwd=folder)
        run(python, "-m", "pydl", "info", cwd=Path(os.sep))
        run(python, "-m", "pydl", "check", "--ops", "gelu,prelu", "--backends", "cpu", cwd=folder)
        run(python, "-m", "pip", "uninstall", "-q", "-y", "pydl")
        run(
            sys.executable, "-m", "pip", "--python", python, "install", "-q", 
            "--no-build-isolation", "--no-deps", ROOT
        )  # fmt: skip
        run(python, "-c", USE, cwd=folder)
    print("wheel-check: the wheel and the plain install work from other folders")


if __name__ == "__main__":
    main()
