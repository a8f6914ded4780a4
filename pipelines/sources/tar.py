"""Images inside a tar, read where they lie: nothing is unpacked.

An archive of class archives (ILSVRC2012_img_train.tar: one nXXXXXXXX.tar a class), of class folders, or of images
alone (ILSVRC2012_img_val.tar). It is listed once; then each image is one read at a known offset, so that any number
of threads and processes may read. The listing is that of the folder one would get by unpacking: the same images in
the same order under the same names and labels, hence the same shards. `tars.webdataset` lists tars in
WebDataset's layout.
"""

from __future__ import annotations

import logging
import os
import posixpath
from pathlib import Path

import numpy as np

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.listing.image_names import IMAGE_EXTENSIONS, listed
from spark_fast.pipelines.sources.listing.splits import refuse_mixed_splits
from spark_fast.pipelines.sources.tars.tar_members import TarListing, list_tar
from spark_fast.pipelines.sources.tars.webdataset import TarSource, holds_webdataset, source_of_listings

logger = logging.getLogger("spark_fast.pipelines")


def tar_source(path: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> TarSource:
    """List the images of a tar: of WebDataset's layout with the labels beside them, else labelled by class archive or
    folder if it has such, else unlabelled.

    Raises DataError, naming the file, when it is no uncompressed tar, is cut short or damaged, holds links or names
    outside of itself, has no image, two archives of one class, or folders of several splits.
    """
    listing = list_tar(path, endings=endings)
    if holds_webdataset(listing):
        return source_of_listings(path, [listing], endings)
    found, classes = _images_of(listing)
    if loose := [name for name in found if classes and name.split("/")[0] not in classes]:
        logger.warning("%s: %d images outside the classes are left out", path, len(loose))
        for name in loose:
            del found[name]
    if not found:
        raise DataError(f"no images in {path}: no file in it ends in {', '.join(endings)}")
    refuse_mixed_splits(path, {posixpath.dirname(name) for name in found})
    left_out = listing.left_out()
    left_out.endings[".cls"] += sum(len(part.labels) for part in listing.parts)
    left_out.log(path)
    names = sorted(found, key=lambda name: (name.split("/")[0] if classes else "", *posixpath.split(name)))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[0]] for name in names], dtype=np.int32) if classes else None
    if labels is not None and (empty := sorted(set(classes) - {classes[i] for i in np.unique(labels)})):
        logger.warning("%s: %d classes have no images: %s", path, len(empty), listed(empty))
    ranges = np.array([(0, *found[name]) for name in names], dtype=np.int64)
    return TarSource(path, map(os.fsencode, names), labels, classes, [path], ranges)


def _images_of(listing: TarListing) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Offset and size of each image, by its name were all unpacked, and the classes' names in order."""
    images = dict(listing.outer.images)
    archives: dict[str, str] = {}  # class -> its archive, whatever folder it lies in
    for name, contents in listing.inner.items():
        folder = posixpath.basename(name).removesuffix(".tar")
        if folder in archives:
            raise DataError(
                f"{listing.path} holds the class {folder} twice, in {archives[folder]} and {name}: remove one of them"
            )
        archives[folder] = name
        images |= {f"{folder}/{image}": where for image, where in contents.images.items()}
    return images, sorted(archives or listing.outer.folders) if any("/" in name for name in images) else []
