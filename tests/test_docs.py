"""The documents say what the code says."""

from __future__ import annotations

from pathlib import Path

import pydl
from pydl.__main__ import markdown

ROOT = Path(__file__).resolve().parents[1]


def test_readme_has_the_op_table() -> None:
    assert markdown().strip() in (ROOT / "README.md").read_text(), "run: python -m pydl table"


def test_versions_agree() -> None:
    assert f'version = "{pydl.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {pydl.__version__}" in (ROOT / "CHANGELOG.md").read_text()
