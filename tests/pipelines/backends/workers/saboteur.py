"""A source whose files can hold an order for the process that reads them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from spark_fast.pipelines import LoaderOptions
from spark_fast.pipelines.backends.torch_pipeline import TorchPipeline
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.folder import FileSource, folder_source


class Saboteur(FileSource):
    """An image `divide` raises, `die` ends the process; after `die once` and `stop once` the image is what it was."""

    def read(self, i: int) -> bytes:
        data = super().read(i)
        path = self.root / self.name(i)
        if data.endswith(b" once"):
            path.write_bytes(path.with_suffix(".sound").read_bytes())
        if data == b"divide":
            return 1 / 0  # type: ignore[return-value]
        if data in (b"die", b"die once"):
            os.kill(os.getpid(), signal.SIGKILL)
        if data == b"stop once":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)  # until it is ended
        return data

    def order(self, i: int, words: str) -> None:
        path = self.root / self.name(i)
        path.with_suffix(".sound").write_bytes(path.read_bytes())
        path.write_bytes(words.encode())

    def mend(self, i: int) -> None:
        path = self.root / self.name(i)
        path.write_bytes(path.with_suffix(".sound").read_bytes())


def sabotaged(root: Path, processes: int = 2, **options: object) -> tuple[TorchPipeline, Saboteur]:
    """The images of a folder, four a batch, in so many worker processes."""
    plain = folder_source(root)
    source = Saboteur(plain.root, [plain.path(i) for i in range(len(plain))], plain.labels, plain.classes)
    asked = {"workers": 2, "input_size": 32, "seed": 5, "max_bad_fraction": 1.0, **options}
    settings = LoaderOptions(4, "torch", worker_processes=processes, **asked)  # type: ignore[arg-type]
    return TorchPipeline(source, Sampler(len(source), 4, 5), settings), source
