"""Where image bytes come from: a list of files, one a line, with or without labels.

A line is `path`, or a path and a label with a tab, a comma, a semicolon or a space between them. A path may hold spaces
and commas: it ends with the first ending of an image after which no more of a path comes, or, without such an ending,
before a tab or the last space if a whole number follows. A first line of column names (`path,label`) makes it a table.
Labels are all whole numbers, or all names, which are numbered in sorted order.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.listing.class_labels import class_numbers
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS, listed

logger = logging.getLogger("spark_fast.pipelines")

_PATHS = "path paths file files filename filenames file_name filepath file_path name image images image_path"
_PATHS += " image_name image_id img img_path"
_LABELS = "label labels label_id class classes class_id class_name classname category category_id target targets y"
_LABELS += " cls species"
_PATH_COLUMNS, _LABEL_COLUMNS = set(_PATHS.split()), set(_LABELS.split())
_ENDING = rb"\.(?:" + "|".join(e[1:] for e in BAND_EXTENSIONS).encode() + rb")"
_SEPARATED = re.compile(
    rb"(?P<path>.*?" + _ENDING + rb")(?P<between>[ ]*[\t,;][ \t]*|[ ]+)"
    rb"(?P<label>(?![^\t]*" + _ENDING + rb"(?:[ \t,;]|$))[^/\\\t,;]*)",
    re.IGNORECASE,
)
_WITHOUT_ENDING = re.compile(rb"(?P<path>.*\S)(?P<between>[ ]*\t[ \t]*|[ ]+)(?P<label>\d{1,10}|(?<=\t)[^/\\\t,;]+)")
_TOO_MANY = re.compile(rb"(?:.*?" + _ENDING + rb")(?:[\t,;][^/\\\t,;]*){2,}", re.IGNORECASE)


class Row(NamedTuple):
    """A line of a list."""

    line: int  # from 1
    path: bytes
    label: bytes | None
    column: int  # of the label's first character, from 1


def list_source(path: Path) -> FileSource:
    """A text file with one image a line, `path` or `path label`, relative to the list's own folder or absolute in it.

    Raises DataError when it cannot be read, is empty or no list, labels only some lines or with what is no class, or
    names a file outside its folder.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file list {path}: {error}") from error
    rows = list(_rows(path, _as_text(path, content)))
    if not rows:
        raise DataError(f"the file list {path} is empty: expected one image path per line.")
    inside = _Inside(path)
    names = [inside(row) for row in rows]
    labels, classes = _labels(path, rows)
    _log_repeated(path, rows, names)
    source = FileSource(path.parent, names, labels, classes)
    if not any(os.path.exists(os.fsencode(path.parent) + b"/" + name) for name in names[:16]):  # noqa: PTH110
        raise DataError(
            f"the files of the list {path} do not exist: {path.parent / source.name(0)} is missing, and so"
            " are the next ones. Paths are relative to the list's folder."
        )
    return source


def _as_text(path: Path, content: bytes) -> bytes:
    """The list without its byte order mark, in UTF-8 if it was in UTF-16."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise DataError(f"{path} is not a file list: it begins as UTF-16 text, but {error}") from error
    if b"\0" in content:
        raise DataError(f"{path} is not a file list: it holds binary data. Expected one image path per line.")
    return content.removeprefix(b"\xef\xbb\xbf")


def _rows(path: Path, content: bytes) -> Iterator[Row]:
    lines = [(n, line.rstrip()) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    comments = {n for n, line in lines if line.lstrip().startswith(b"#") and not _exists(path, line)}
    if comments:
        logger.info("%s: %d lines are comments", path, len(comments))
        lines = [(n, line) for n, line in lines if n not in comments]
    if lines and (header := _header(path, *lines[0])):
        return _table_rows(path, lines[1:], *header)
    return (_row(path, number, line) for number, line in lines)


def _exists(path: Path, line: bytes) -> bool:
    """Whether a line that looks like a comment or column names, or the path at its start, is a file."""
    labelled = _SEPARATED.fullmatch(line)
    names = [line.strip(), *([labelled["path"].strip()] if labelled else [])]
    return any(os.path.isfile(os.fsencode(path.parent) + b"/" + name) for name in names)  # noqa: PTH113  # of any length


def _row(path: Path, number: int, line: bytes) -> Row:
    """A line of a list without column names."""
    if line.lstrip().startswith(b'"'):
        separator = next((s for s in "\t;, " if f'"{s}'.encode() in line), ",")
        fields = _fields(line.strip(), separator)
        if len(fields) > 2:
            raise _too_many(path, number, line, len(separator.join(fields[:2])) + 2)
        label = os.fsencode(fields[1].strip()) if len(fields) == 2 else None
        return Row(number, os.fsencode(fields[0].strip()), label, _length(line) + 1 - len(label or b""))
    match = _SEPARATED.fullmatch(line) or _WITHOUT_ENDING.fullmatch(line)
    if match is None or (match.re is _WITHOUT_ENDING and match["label"].isdigit() and int(match["label"]) >= 2**31):
        if _TOO_MANY.fullmatch(line):
            *first, _ = re.split(rb"[\t,;]", line)
            raise _too_many(path, number, line, _length(b",".join(first)) + 2)
        return Row(number, line.strip(), None, _length(line) + 1)
    label = match["label"].strip()
    if more := re.match(rb"[-+]?\d+ +", label):
        raise _too_many(path, number, line, _length(line[: match.start("label") + more.end()]) + 1)
    return Row(number, match["path"].strip(), label, _length(line[: match.start("label")]) + 1)


def _length(line: bytes) -> int:
    """In characters, as an editor counts its columns."""
    return len(line.decode("utf-8", "replace"))


def _too_many(path: Path, number: int, line: bytes, column: int) -> DataError:
    shown = line.decode("utf-8", "backslashreplace")
    return DataError(
        f"{path}, line {number}, column {column}: more than a path and a label: {shown!r}. Give two columns, or"
        " name the columns in a first line, `path` and `label` among them."
    )


def _fields(line: bytes, separator: str) -> list[str]:
    try:
        return next(csv.reader([os.fsdecode(line)], delimiter=separator), [])
    except csv.Error:  # a field without end
        return [os.fsdecode(line)]


def _header(path: Path, number: int, line: bytes) -> tuple[str, int, int, int | None] | None:
    """Separator, how many columns there are, and those of path and label, if this line names columns."""
    if re.search(_ENDING, line, re.IGNORECASE) or _exists(path, line):
        return None
    for separator in "\t;, ":
        names = [name.strip().lower() for name in _fields(line, separator)]
        paths = [i for i, name in enumerate(names) if name in _PATH_COLUMNS]
        labels = [i for i, name in enumerate(names) if name in _LABEL_COLUMNS]
        if not paths or (separator == " " and len(names) != len(paths + labels)):
            continue
        if several := next((found for found in (paths, labels) if len(found) > 1), None):
            one, other = (names[i] for i in several[:2])
            raise DataError(
                f"{path}, line {number}, column {several[1] + 1}: the columns {one!r} and {other!r} are ambiguous."
                " Name one column `path`, one `label`, and the others differently."
            )
        left = [name for i, name in enumerate(names) if i not in paths + labels]
        if left:
            logger.warning("%s: the columns %s are left out", path, listed(left))
        return separator, len(names), paths[0], labels[0] if labels else None
    return None


def _table_rows(
    path: Path, lines: list[tuple[int, bytes]], separator: str, width: int, paths: int, labels: int | None
) -> Iterator[Row]:
    """The rows below a line of column names; columns are counted in columns of the table."""
    for number, line in lines:
        fields = _fields(line, separator)
        if len(fields) != width:
            raise DataError(
                f"{path}, line {number}, column {min(len(fields), width) + 1}: there are {len(fields)} columns, but the"
                f" first line names {width}. Put a path that contains {separator!r} in double quotes."
            )
        label = None if labels is None else os.fsencode(fields[labels].strip())
        yield Row(number, os.fsencode(fields[paths].strip()), label, (labels or 0) + 1)


class _Inside:
    """Paths of a list as paths below its folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        folders = [os.path.abspath(path.parent), os.path.realpath(path.parent)]  # noqa: PTH100
        self._folders = [os.fsencode(folder).rstrip(b"/") + b"/" for folder in folders]

    def __call__(self, row: Row) -> bytes:
        """The path of this row; DataError when it is none, or leads out of the folder."""
        if not row.path:
            raise DataError(f"{self._path}, line {row.line}: no path")
        inside = os.path.normpath(row.path)
        if inside.startswith(b"/"):
            for path in (inside, os.path.join(os.path.realpath(os.path.dirname(inside)), os.path.basename(inside))):  # noqa: PTH118, PTH119, PTH120
                for folder in self._folders:
                    if path.startswith(folder):
                        return path[len(folder) :]
        if inside.startswith((b"/", b"../")) or inside == b"..":
            raise DataError(
                f"{self._path}, line {row.line}: {os.fsdecode(row.path)!r} lies outside the list's folder. Put the"
                " list at the top of the images' folder and use paths relative to it."
            )
        return row.path


def _labels(path: Path, rows: list[Row]) -> tuple[NDArray[np.int32] | None, list[str]]:
    """The label of each row, and the classes' names where labels are names."""
    labelled = rows[0].label is not None
    for row in rows:
        if (row.label is not None) != labelled:
            raise DataError(
                f"{path}, line {row.line}: either all lines have a label or none; this differs (column {row.column})"
            )
    texts = [row.label for row in rows if row.label is not None]
    if not texts:
        return None, []
    return class_numbers(texts, lambda i: f"{path}, line {rows[i].line}, column {rows[i].column}")


def _log_repeated(path: Path, rows: list[Row], names: list[bytes]) -> None:
    first: dict[bytes, bytes | None] = {}
    for row, name in zip(rows, names, strict=True):
        first.setdefault(name, row.label)
    if repeated := len(names) - len(first):
        other = sum(first[name] != row.label for row, name in zip(rows, names, strict=True))
        labels = f", {other} of them with another label" if other else ""
        logger.warning("%s: %d lines repeat an image%s; each line counts", path, repeated, labels)
