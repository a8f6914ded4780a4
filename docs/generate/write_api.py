"""Write docs/reference/api.md, the public names of Python, from their signatures and docstrings.

python docs/generate/write_api.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ForwardRef

from spark_fast.errors import SparkFastError

PAGE = Path(__file__).parents[1] / "reference" / "api.md"
NAMES = {  # heading -> names of the section
    "Pre-train": ["spark_fast.pretrain", "spark_fast.training.pretrain.PretrainResult"],
    "Models": [
        "spark_fast.build_spark",
        "spark_fast.build_fcmae",
        "spark_fast.method.Method.forward",
        "spark_fast.method.Method.reconstruct",
        "spark_fast.method.Method.encode",
    ],
    "Networks": ["spark_fast.pack", "spark_fast.verify", "spark_fast.encoder.register"],
    "Weights": [
        "spark_fast.load_spark_state_dict",
        "spark_fast.weights.load_pretrained.load_pretrained",
        "spark_fast.weights.export_formats.export",
        "spark_fast.weights.read.read_weights",
    ],
    "Images": [
        "spark_fast.pipelines.build_pipeline",
        "spark_fast.pipelines.LoaderOptions",
        "spark_fast.pipelines.View",
        "spark_fast.pipelines.Pipeline.epoch",
        "spark_fast.pipelines.Batch",
    ],
    "Methods of your own": ["spark_fast.method.Method", "spark_fast.method.Recipe", "spark_fast.method.build"],
    "Errors": [
        f"spark_fast.errors.{name}"
        for name in (
            "SparkFastError",
            "SettingsError",
            "DataError",
            "NotFiniteError",
            "LostRankError",
            "StorageError",
            "CheckpointError",
            "MisfitError",
        )
    ],
}
HEAD = """# The Python API

`spark_fast.pretrain` runs a whole pre-training; `spark_fast.build_spark` gives a model for a loop of your own.
Names that are not on this page may change. Shapes: B images, C channels, K masks an image, an h x w grid of patches,
V visible patches, b cells along a side of a patch. `python docs/generate/write_api.py` writes this page from the code.
"""
WIDTH = 100  # columns of a code block


def page() -> str:
    """The page."""
    return HEAD + "".join(
        f"\n## {heading}\n" + "".join(entry(name) for name in names) for heading, names in NAMES.items()
    )


def entry(name: str) -> str:
    """Heading, signature and docstring of a name."""
    thing = find(name)
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    return f"\n### `{shown(name)}`\n\n```py\n{signature(name, thing)}\n```\n\n" + "\n".join(markdown(text)) + "\n"


def shown(name: str) -> str:
    """The name as the reader writes it; a method without its package."""
    return name.removeprefix("spark_fast.method.") if ".Method." in name else name


def find(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            thing = getattr(thing, attribute)
        return thing
    raise LookupError(name)


def signature(name: str, thing: Any) -> str:
    """`name(parameters) -> result`, a parameter a line where it is long."""
    own = name.rsplit(".", 1)[1]
    if inspect.isclass(thing) and issubclass(thing, SparkFastError):
        return f"class {own}({thing.__bases__[0].__name__}):  # exit code {thing.exit_code}"
    found = inspect.signature(thing)
    result = "" if inspect.isclass(thing) else f" -> {found.return_annotation}"
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    words = [_parameter(p) for p in parameters]
    first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None:
        words.insert(first, "*")
    line = f"{own}({', '.join(words)}){result}"
    return line if len(line) <= WIDTH else f"{own}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    """`name: type = default`; an object of settings as a call without arguments, a factory as `...`."""
    kind, default = parameter.annotation, parameter.default
    kind = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
    stars = (
        "**" if parameter.kind is parameter.VAR_KEYWORD else "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
    )
    said = f"{stars}{parameter.name}: {kind}"
    if default is parameter.empty:
        return said
    if dataclasses.is_dataclass(default):
        return f"{said} = {type(default).__name__}()"
    return f"{said} = ..." if repr(default).startswith("<") else f"{said} = {default!r}"


def markdown(text: str) -> Iterator[str]:
    """A docstring as Markdown: its sections (Args, Returns, Raises ...) are lists."""
    section = False
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = True
            yield from (f"*{line[:-1]}*", "")
        elif section and re.match(r" {4}\S", line):
            name, colon, rest = line.strip().partition(": ")
            yield f"- `{name}`: {rest}" if colon else f"- {line.strip()}"
        elif section and line.startswith(" "):
            yield f"  {line.strip()}"
        else:
            section = section and not line
            yield line.replace("<", "\\<") if "`" not in line else line


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
