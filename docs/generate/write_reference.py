"""Write docs/reference/settings.md and commands.md: every flag of the seven commands, from what defines them.

python docs/generate/write_reference.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from spark_fast.cli import convert, doctor, export, plot, reconstruct
from spark_fast.evaluation.eval_settings import Finetune, Knn, Linear
from spark_fast.training.settings import Settings

PAGE = Path(__file__).parents[1] / "reference" / "settings.md"
COMMANDS: dict[str, type] = {
    "spark-fast-train": Settings,
    "spark-fast-eval knn": Knn,
    "spark-fast-eval linear": Linear,
    "spark-fast-eval finetune": Finetune,
}
TOOLS_PAGE = PAGE.with_name("commands.md")
TOOLS: dict[str, Callable[..., int]] = {
    "spark-fast-convert": convert.convert_images,
    "spark-fast-export": export.export_weights,
    "spark-fast-reconstruct": reconstruct.reconstruct,
    "spark-fast-plot": plot.plot_run,
    "spark-fast-doctor": doctor.doctor,
}
TOOLS_HEAD = """# Every command

| command | what it does |
| --- | --- |
| [`spark-fast-convert`](#spark-fast-convert) | convert images into shards, which are read faster |
| [`spark-fast-train`](settings.md#spark-fast-train) | pre-training; under torchrun `python -m spark_fast.train` |
| [`spark-fast-eval`](settings.md#spark-fast-eval-knn) | k-NN, linear probe and fine-tuning of a pre-trained encoder |
| [`spark-fast-export`](#spark-fast-export) | weights for timm, torchvision, the Hub or the published code |
| [`spark-fast-reconstruct`](#spark-fast-reconstruct) | a picture: input, visible patches, prediction |
| [`spark-fast-plot`](#spark-fast-plot) | curves of runs as one picture |
| [`spark-fast-doctor`](#spark-fast-doctor) | check what this machine supports and what is missing |

Every command takes `--help` and `--version`. `python docs/generate/write_reference.py` writes this
page from the commands.

## Exit codes

| code | what happened |
| --- | --- |
| 0 | done |
| 1 | `spark-fast-doctor`: something that training needs is missing |
| 2 | a setting is wrong |
| 3 | the images cannot be used |
| 4 | loss or gradient were not finite for several steps in a row |
| 5 | a rank was lost, or the run stalled |
| 6 | a file cannot be read or written |
| 75 | stopped early, everything is saved: the same command with `--resume auto` continues (0 under torchrun) |
| 130 | Ctrl-C in a command that does not train, or before training begins |
| 141 | the output was closed (`\\| head`) |
"""
HEAD = """# Every setting

`python docs/generate/write_reference.py` writes this page from the code. A flag may also be written with
dashes, and as `--name=value`. `--config file.toml` takes the same names in a table for each group (`--print_config`
prints such a file). Files and `spark_fast.pretrain` take the long names alone: `batch_size`, not `bs`. Flags override
the file.
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for command, tree in COMMANDS.items():
        parts.append(f"\n## {command}\n\n{(tree.__doc__ or '').strip()}\n")
        hints = get_type_hints(tree, include_extras=True)
        for group in dataclasses.fields(tree):
            kind = _plain(hints[group.name])
            parts.append(f"\n### [{group.name}] {(kind.__doc__ or '').strip()}\n\n")
            parts.append("| flag | default | what |\n| --- | --- | --- |\n")
            parts += [f"| {flag} | {default} | {what} |\n" for flag, default, what in rows(kind)]
    return "".join(parts)


def commands() -> str:
    """The page of the commands that are functions."""
    parts = [TOOLS_HEAD]
    for command, tool in TOOLS.items():
        module = inspect.getmodule(tool)
        about = (inspect.getdoc(module) or "").split("\n\n")
        parts.append(f"\n## {command}\n\n{about[0]}\n\n")
        parts.append("| argument | default | what |\n| --- | --- | --- |\n")
        parts += [f"| {flag} | {default} | {what} |\n" for flag, default, what in tool_rows(tool)]
    return "".join(parts)


def tool_rows(tool: Callable[..., int]) -> list[tuple[str, str, str]]:
    """(argument, default, what it does) of each parameter of a command; a group of flags, of each of its fields."""
    said = {
        p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse(tool.__doc__ or "").params
    }
    hints = get_type_hints(tool, include_extras=True)
    found = []
    for name, parameter in inspect.signature(tool).parameters.items():
        plain, marks = _plain(hints[name]), get_args(hints[name])[1:]
        if isinstance(plain, type) and dataclasses.is_dataclass(plain):
            found += rows(plain)
            continue
        given = [mark for mark in marks if getattr(mark, "metavar", None)]
        if tyro.conf.Positional in marks:
            flag = f"`{given[0].metavar}`".replace("|", "\\|")
        else:
            flag = f"`--{next((mark.name for mark in marks if getattr(mark, 'name', None)), name)}`"
        flag += f" ({', '.join(map(str, get_args(plain)))})" if get_origin(plain) is Literal else ""
        default = parameter.default
        empty = default is inspect.Parameter.empty or default in (None, "", ())
        required = "required" if default is inspect.Parameter.empty else ""
        found.append((flag, required if empty else f"`{default}`", said[name].replace("|", "\\|")))
    return found


def rows(kind: type) -> list[tuple[str, str, str]]:
    """(flag with its other spellings, default, what it does) of each field of a group."""
    said, hints = _said(kind), get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        aliases = [a for part in get_args(hint)[1:] for a in getattr(part, "aliases", None) or ()]
        flags = ", ".join(f"`{flag}`" for flag in (f"--{field.name}", *aliases))
        plain = _plain(hint)
        if get_origin(plain) is Literal:
            flags += f" ({', '.join(map(str, get_args(plain)))})"
        default = "" if field.default in (None, "", ()) else f"`{field.default}`"
        found.append((flags, default, said[field.name].replace("|", "\\|")))
    return found


def _plain(hint: Any) -> Any:
    """A type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _said(kind: type) -> dict[str, str]:
    """The string under each field of a class and its bases, as written in their source."""
    said: dict[str, str] = {}
    for base in reversed([b for b in kind.__mro__ if dataclasses.is_dataclass(b)]):
        (tree,) = ast.parse(dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                said[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return said


if __name__ == "__main__":
    for page, content in ((PAGE, reference()), (TOOLS_PAGE, commands())):
        page.write_text(content, encoding="utf-8")
        print(f"wrote {page}")
