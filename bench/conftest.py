"""Options of `pytest bench`: those of `python -m bench` that a table of pytest-benchmark has a use
for."""

from __future__ import annotations

import pytest

from bench import options
from bench.options import UsageError

DEFAULTS = {
    "ops": "all",
    "backends": "auto",
    "device": "cpu",
    "dtype": "float32",
    "shapes": "",
    "peers": "torch",
    "passes": "forward,backward",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "what to measure, as in python -m bench --help")
    for name, default in DEFAULTS.items():
        shown = default or "the first of each op's"
        group.addoption(f"--{name}", default=default, help=f"default: {shown}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for every op, shape, dtype, pass and contender."""
    given = {name: metafunc.config.getoption(f"--{name}") for name in DEFAULTS}
    words = [f"--{name}={value}" for name, value in given.items() if value]
    try:
        quick = [] if given["shapes"] else ["--quick"]
        settings = options.settings(options.parser().parse_args([*words, *quick]))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    found = [
        pytest.param(settings, op, shape, dtype, direction, name, id=f"{row}-{direction}-{name}")
        for op in settings.ops
        for shape in settings.shapes_of(op)
        for dtype in settings.dtypes_of(op)
        for row in [f"{op}-{options.label(shape)}-{dtype}"]
        for direction in settings.passes
        for name in (*settings.backends, *settings.peers)
    ]
    metafunc.parametrize("settings, op, shape, dtype, direction, contender", found)
