"""The command line: `python -m pydl info | check | replace | table`."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence

import torch

from pydl import check, info, load
from pydl.backends import NAMES
from pydl.table import TABLE, Op

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("is empty, wants names with commas between them")
    return names


def _dtypes(text: str) -> list[torch.dtype]:
    names = [SHORT.get(name, name) for name in _names(text)]
    for name in names:
        if name not in DTYPES:
            wanted = ", ".join([*DTYPES, *SHORT])
            raise argparse.ArgumentTypeError(f"has {name!r}, wants some of {wanted}")
    return [DTYPES[name] for name in names]


def _call(op: Op) -> str:
    """The signature without types, and without `backend`, which every op has."""
    shown, keyword_only = [], False
    for parameter in inspect.signature(op.function).parameters.values():
        if parameter.name == "backend":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        default = parameter.default
        shown.append(
            parameter.name if default is parameter.empty else f"{parameter.name}={default!r}"
        )
    return f"{op.name}({', '.join(shown)})"


def markdown() -> str:
    """The op table for the README, from its rows."""
    lines = ["| function | what it computes | dtypes | under autocast |", "|---|---|---|---|"]
    short = {DTYPES[long]: brief for brief, long in SHORT.items()}
    for op in TABLE.values():
        dtypes = ", ".join(short[dtype] for dtype in op.dtypes)
        policy = {"keep": "keeps the input's dtype", "lower": "computes in autocast's dtype"}
        cells = (f"`{_call(op)}`", op.doc.rstrip("."), dtypes, policy[op.autocast])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pydl", description="Fused deep-learning kernels for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    about = "versions, devices, which backends are available or why not, and switches"
    show = commands.add_parser("info", help=about, description=f"Shows {about}.")
    show.add_argument("--json", action="store_true", help="as JSON")
    about = "runs every op's samples on this machine against its definition in fp64"
    run = commands.add_parser(
        "check",
        help=about,
        description=f"check {about}: output and gradients, a line per op and backend.",
        epilog="The exit status is 0 if all is right, 1 if anything is wrong or nothing was "
        "checked, "
        "2 if an option cannot be met.",
    )
    run.add_argument(
        "--ops", type=_names, metavar="A,B", help=f"of {', '.join(TABLE)}; default: all"
    )
    run.add_argument(
        "--backends",
        type=_names,
        metavar="A,B",
        help=f"of {', '.join(check.KERNELS)}, torch; default: the kernels available here",
    )
    run.add_argument(
        "--dtype",
        type=_dtypes,
        metavar="A,B",
        help="of float32, float16, bfloat16, float64 (or fp32, fp16, bf16, fp64); default: all "
        "that an op has",
    )
    run.add_argument("--device", help="such as cpu or cuda:1; default: where each backend computes")
    about = "shows what pydl.replace does to a model, and measures it"
    swap = commands.add_parser(
        "replace",
        help=about,
        description=f"replace {about}.",
        epilog="The exit status is 0, or 2 if there is no such model or an option cannot be met.",
    )
    swap.add_argument(
        "path", metavar="module:factory", help="a function without arguments that returns a model"
    )
    swap.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE[:BELOW]]",
        help="an input to measure the model with, such as 1,3,224,224 or 2,16:int64:1000; once for "
        "each argument",
    )
    for name, doc in (("include", "swap only"), ("exclude", "leave alone")):
        swap.add_argument(
            f"--{name}",
            type=_names,
            default=[],
            metavar="A,B",
            help=f"{doc} modules of these names, with * and ?",
        )
    swap.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute steps that stand side by side in one pass",
    )
    swap.add_argument("--backend", choices=NAMES, help="who computes; default: automatic")
    about = "prints the op table in Markdown, as the README has it"
    commands.add_parser("table", help=about, description=f"table {about}.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    args = _parser().parse_args(argv)
    if args.command == "info":
        print(json.dumps(info.collect(), indent=2) if args.json else info.text())
        return 0
    if args.command == "table":
        print(markdown())
        return 0
    try:
        if args.command == "replace":
            options = (args.include, args.exclude, args.fuse, args.backend)
            print(load.report(args.path, args.example, *options))
            return 0
        return check.main(args.ops, args.backends, args.dtype, args.device)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
