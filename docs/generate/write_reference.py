"""Write docs/reference/settings.md, every setting of training and evaluation, from the trees that define them.

python docs/generate/write_reference.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from spark_fast.evaluation.eval_settings import Finetune, Knn, Linear
from spark_fast.training.settings import Settings

PAGE = Path(__file__).parents[1] / "reference" / "settings.md"
COMMANDS: dict[str, type] = {
    "spark-fast-train": Settings,
    "spark-fast-eval knn": Knn,
    "spark-fast-eval linear": Linear,
    "spark-fast-eval finetune": Finetune,
}
HEAD = """# Every setting

Written by `python docs/generate/write_reference.py` from the settings themselves. A flag may also be written with
dashes and as `--name=value`; `--config file.toml` takes the same names in a table for each group (`--print_config`
prints one), and flags win over it.
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
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
