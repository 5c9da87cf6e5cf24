"""What `python -m pydl replace` is given: a path to a model, and shapes of its inputs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydl.replace import replace

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float64": torch.float64, "int64": torch.int64,
}  # fmt: skip
_EXAMPLE = re.compile(r"(\d+(?:,\d+)*|)(?::([a-z0-9]+)(?::(\d+))?)?")


def model(path: str) -> nn.Module:
    """The model at `package.module:name`: a module, or what a function, or class, without arguments
    returns.

    Raises:
        ValueError: there is no model at the path.
    """

    def wrong(why: str) -> ValueError:
        return ValueError(f"pydl: replace: path is {path!r}, {why}")

    where, colon, name = path.partition(":")
    if not (where and colon and name):
        raise wrong("wants package.module:factory")
    try:
        found: Any = importlib.import_module(where)
    except Exception as error:
        raise wrong(f"but {where} does not import: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = [one for one in vars(found) if not one.startswith("_")]
            raise wrong(f"but there is no {part!r}, wants one of {', '.join(known[:12])}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise wrong(f"which is a {type(found).__name__}, wants a function that returns a model")
        try:
            found = found()
        except Exception as error:
            raise wrong(f"which fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise wrong(f"which returns a {type(found).__name__}, wants a torch.nn.Module")
    return found


def example(text: str, model: nn.Module) -> Tensor:
    """Random values for `SHAPE[:DTYPE[:BELOW]]` where the model lives: "1,3,224,224",
    "2,16:int64:1000".

    Without a dtype it is the model's; integers are below BELOW, 2 by default.

    Raises:
        ValueError: the text is not as above.
    """
    match = _EXAMPLE.fullmatch(text.replace(" ", ""))
    dtype = match and match[2]
    if not match or (dtype and dtype not in DTYPES) or (match[3] and dtype != "int64"):
        raise ValueError(
            f"pydl: replace: example is {text!r}, wants sizes with commas between them, then "
            f":dtype if it is not the model's, of {', '.join(DTYPES)}, then :below for int64; such "
            "as 1,3,224,224 or 2,16:int64:1000"
        )
    shape = tuple(int(size) for size in match[1].split(",") if size)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if dtype == "int64":
        return torch.randint(int(match[3] or 2), shape, device=first.device)
    drawn = torch.randn(shape, device=first.device)
    return drawn.to(DTYPES[dtype] if dtype else first.dtype)


def report(
    path: str,
    examples: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fuse: bool = False,
    backend: str | None = None,
) -> str:
    """What `pydl.replace` reports of a model.

    Raises:
        ValueError: there is no model at the path, or an example, or the backend, is not as above.
        RuntimeError: the backend is not available, or the model does not run on the examples.
    """
    found = model(path)
    inputs = tuple(example(text, found) for text in examples)
    done = replace(
        found, include=list(include) or None, exclude=list(exclude) or None, fuse=fuse,
        backend=backend, example_inputs=inputs or None,
    )  # fmt: skip
    return str(done)
