"""Which folder holds the training images: train/ if it is a split, the folder itself if `train` is a class.

A folder's splits are those of its folders that are named as splits (train, val, test, in any spelling) and hold images.

- Splits of two kinds: those named exactly `train`, `val`, `test` are taken. The rest is left out, and the log says so.
- One alone: it is taken, too, unless folders of other names beside it hold images. Then all of them are classes; where
  it is deep and they are flat, or the other way round, that is unclear, and refused.
- Splits of two kinds under other names (Train, train2017), or further down: refused with the path to give, as all of
  them would be trained on.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.listing.folder_tree import files_in, folders_in, holds_images, read_tree, tars_in
from spark_fast.pipelines.sources.listing.image_names import IMAGE_EXTENSIONS, NAMED, is_image, listed
from spark_fast.pipelines.sources.shard_format import MANIFEST

logger = logging.getLogger("spark_fast.pipelines")

SPLITS = ("train", "val", "test")
_KINDS = {
    "train": "train", "trainval": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "eval": "val",
    "test": "test", "testing": "test",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled",
}  # fmt: skip
_WORDS = "|".join(sorted(_KINDS, key=len, reverse=True))
_NAME = re.compile(
    rf"((ilsvrc\d*|imagenet\d*k?|imgs?|images?|data)[-_ ]?)*(?P<word>{_WORDS})"
    r"([-_ ]?(set|data|imgs?|images?|split))?([-_ ]?v?\d+)*",
    re.IGNORECASE,
)


def split_of(name: str) -> str | None:
    """The kind of split that a folder of this name is: train, val, test, unlabeled; None for any other name."""
    match = _NAME.fullmatch(name)
    return _KINDS[match["word"].lower()] if match else None


def split_of_file(name: str) -> str | None:
    """The kind of split in the name of a tar of images: imagenet1k-train-0000.tar; None without one, or with two."""
    kinds = {_KINDS[word] for word in re.split(r"[-_.\d]+", name.lower()) if word in _KINDS}
    return kinds.pop() if len(kinds) == 1 else None


class Splits(NamedTuple):
    """What `find_splits` made of a folder."""

    taken: dict[str, Path]  # by their names in SPLITS; empty when the folder itself is the images
    others: list[Path]  # beside them, with images
    endings: tuple[str, ...] = IMAGE_EXTENSIONS  # of what is taken for an image

    def log_left_out(self, root: Path, used: Iterable[str]) -> None:
        """Log which folders hold images that are not used, where a split is."""
        if not self.taken:
            return
        left = [path for name, path in self.taken.items() if name not in used and _holds(path, self.endings)]
        left += self.others
        counts = {path.name: len(read_tree(path, self.endings)) for path in left if not (path / MANIFEST).exists()}
        counted = [f"{name}/ ({f'{count} images' if count else 'tars'})" for name, count in [*counts.items()][:NAMED]]
        if more := list(counts.values())[NAMED:]:
            counted.append(f"{len(more)} more folders ({sum(more)} images)")
        if loose := sum(is_image(path.name, self.endings) for path in files_in(root)):
            counted.append(f"{loose} images in no folder")
        if counted:
            level = logging.WARNING if self.others or loose else logging.INFO
            taken = ", ".join(f"{self.taken[name].name}/" for name in used)
            logger.log(level, "%s: read: %s; left out: %s", root, taken, ", ".join(counted))


def find_splits(root: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> Splits:
    """The splits of a folder; see above.

    Raises DataError when it is not clear which folder is meant, with the paths to give.
    """
    folders = folders_in(root)
    exact = {name: root / name for name in SPLITS if root / name in folders}
    if not any(split_of(path.name) for path in folders):
        return Splits({}, [], endings)
    held = [path for path in folders if _holds(path, endings)]
    splits = [path for path in held if split_of(path.name)]
    others = [path for path in held if not split_of(path.name)]
    kinds = {split_of(path.name) for path in splits}
    if len(kinds) <= 1 and others:
        return _as_classes(root, Splits(exact, others, endings), splits)
    named_otherwise = [path for path in splits if path.name not in exact and split_of(path.name) == "train"]
    if "train" in exact or (exact and not named_otherwise):
        return Splits(exact, [path for path in held if path.name not in exact], endings)
    if len(kinds) > 1:
        raise _several(root, splits)
    return Splits({"train": splits[0]} if len(named_otherwise) == 1 else {}, [], endings)


def train_folder(root: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> Path:
    """The folder with the training images of `root`, maybe itself; the log says what is left out.

    Raises DataError when `root` holds splits but none is clearly the one to train on.
    """
    taken, others, _ = found = find_splits(root, endings)
    if "train" in taken:
        found.log_left_out(root, ["train"])
        return taken["train"]
    if len(taken) + len(others) > 1:
        raise _several(root, [*taken.values(), *others])
    return root


def refuse_mixed_splits(root: Path, folders: Iterable[str]) -> None:
    """Raise DataError when several splits lie somewhere below `root`, a folder or a tar; `folders` hold the images."""
    below: dict[str, dict[str, str]] = {}  # folder -> its splits and their kinds
    for path in (folder.split("/") for folder in sorted(folders) if folder):
        for depth, name in enumerate(path):
            if kind := split_of(name):
                below.setdefault("/".join(path[:depth]), {})[name] = kind
    mixed = {where: list(names) for where, names in sorted(below.items()) if len(set(names.values())) > 1}
    if not mixed:
        return
    where, names = next(iter(mixed.items()))
    if root.is_file():
        raise DataError(
            f"{root} holds several splits ({_folders(names, where)}), and all would be trained on. Unpack it, tar -xf"
            f" {shlex.quote(str(root))}, and give the folder of one split."
        )
    if len(mixed) == 1:
        raise _several(root / where, [root / where / name for name in names])
    meant = shlex.quote(f"*/{min(names, key=_preference)}/*")
    raise DataError(
        f"{root} holds {len(mixed)} folders with several splits each, such as {_folders(names, where)}: they would be"
        " mixed. List the images of one split:\n"
        f"  cd {shlex.quote(str(root))} && find . -type f -path {meant}"
        " | grep -Ei '[.](jpe?g|png|tiff?|bmp|webp)$' > list.txt\n"
        "then give the list."
    )


def _as_classes(root: Path, found: Splits, splits: list[Path]) -> Splits:
    """Splits of one kind beside folders with other names: classes like these, or a split with something beside it."""
    exact, others, endings = found
    for path in splits:
        if path.name in exact and ((path / MANIFEST).exists() or any(tars_in(path))):
            return found
        if _is_flat(path, endings) not in [_is_flat(other, endings) for other in others]:
            raise DataError(
                f"{root} holds {path.name}/ and other folders with images ({listed([p.name for p in others])}):"
                f" {path.name} may be a split or a class. For the split give {path}; for classes, a list of all images."
            )
    if splits:
        logger.warning(
            "%s: %s is read as a class, because %s hold images, too. For that folder alone give %s",
            root, listed([p.name for p in splits]), listed([p.name for p in others]), splits[0],
        )  # fmt: skip
    return Splits({}, [], endings)


def _several(root: Path, splits: list[Path]) -> DataError:
    meant = min(splits, key=lambda path: _preference(path.name))
    return DataError(
        f"{root} holds several splits ({_folders([path.name for path in splits])}), and all would be trained on. Give"
        f" one of them: {meant}. (To train on all of them, give a file list.)"
    )


def _folders(names: list[str], where: str = "") -> str:
    return listed([f"{where}/{name}/".lstrip("/") for name in names])


def _preference(name: str) -> tuple[bool, str]:
    """Orders the names of splits: those for training first."""
    return split_of(name) != "train", name.lower()


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    """Whether there are images in a folder, in whatever form."""
    return (folder / MANIFEST).exists() or any(tars_in(folder)) or holds_images(folder, endings)


def _is_flat(folder: Path, endings: tuple[str, ...]) -> bool:
    return any(is_image(path.name, endings) for path in files_in(folder))
