"""One extension for every x86-64 processor: what runs without being chosen is baseline code."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from pydl._native import C


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump shows the code")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are x86-64's")
def test_loading_needs_no_vectors() -> None:
    """Static initialisers of the files compiled for AVX2 and AVX-512 run at import everywhere: none
    has an instruction of theirs."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.findall(r"^[0-9a-f]+ <(_GLOBAL__sub_I_[^>]*)>:\n(.*?)\n\n", text, re.M | re.S)
    assert len(found) >= 9, [name for name, _ in found]
    for name, code in found:
        wrong = re.findall(r"^\s*[0-9a-f]+:\s+(v\S+|andn|bzhi|mulx|rorx|s[ah][lr]x)\b", code, re.M)
        assert not wrong, (name, wrong[:4])
