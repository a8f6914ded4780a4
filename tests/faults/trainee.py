"""`spark-fast-train` that keeps a ledger of the samples it is given, and meets planned faults.

    python trainee.py LEDGER PLAN [flags of spark-fast-train]

PLAN is a list such as 1:4:kill,0:5:nan: rank 1 gets SIGKILL, and rank 0 a batch with a NaN, instead of step 4 or 5
(counted from 0); nan, inf, raise, hang, or any signal. A signal comes once, also when the run is started again. With
`saved` in it, a save that falls due is not put off but waits for the one before it: when step N is given out, N steps
are done and the checkpoint of N - 1 is on disk, however slow the disk. The ledger has a line for every step begun.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

from spark_fast.checkpoint.async_writer import AsyncWriter
from spark_fast.cli import train
from spark_fast.pipelines import Batch, LoaderOptions, Pipeline
from spark_fast.run import command


class Watched:
    """A pipeline whose batches are written down, and spoiled as planned."""

    def __init__(self, pipeline: Pipeline, rank: int, ledger: Path, plan: dict[tuple[int, int], str]) -> None:
        self._pipeline, self._rank, self._ledger, self._plan = pipeline, rank, ledger, plan
        self.num_samples, self.listing = pipeline.num_samples, pipeline.listing
        self.bad_images, self.statistics = pipeline.bad_images, pipeline.statistics

    def __len__(self) -> int:
        return len(self._pipeline)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        batches = self._pipeline.epoch(epoch, start_step)
        try:
            for step, batch in enumerate(batches, epoch * len(self) + start_step):
                with self._ledger.open("a") as ledger:  # one write: ranks share the file
                    ledger.write(json.dumps({"step": step, "rank": self._rank, "ids": batch.ids.tolist()}) + "\n")
                yield self._meet(self._plan.get((self._rank, step), ""), step, batch)
        finally:
            batches.close()

    def close(self) -> None:
        self._pipeline.close()

    def _meet(self, fault: str, step: int, batch: Batch) -> Batch:
        if fault in ("nan", "inf"):
            batch.images[0, 0, 0, 0] = float(fault)
        elif fault == "raise":
            raise ZeroDivisionError("planned")
        elif fault == "hang":
            time.sleep(600)
        elif fault:
            try:
                Path(f"{self._ledger}.{self._rank}.{step}").touch(exist_ok=False)
            except FileExistsError:
                return batch
            os.kill(os.getpid(), getattr(signal, f"SIG{fault.upper()}"))
        return batch


def main(words: list[str]) -> int:
    ledger, plan, *flags = words
    faults = [fault.split(":") for fault in plan.split(",") if ":" in fault]
    planned = {(int(rank), int(step)): what for rank, step, what in faults}
    build, due = command.build_pipeline, AsyncWriter.due

    def watched(data_path: str | Path | None, options: LoaderOptions) -> Watched | Pipeline:
        pipeline = build(data_path, options)
        if not options.view.augment:  # for pictures
            return pipeline
        return Watched(pipeline, options.rank, Path(ledger), planned)

    def waited(writer: AsyncWriter, step: int) -> bool:
        writer.wait()
        return due(writer, step)

    command.build_pipeline = watched  # type: ignore[assignment]
    if "saved" in plan.split(","):
        AsyncWriter.due = waited  # type: ignore[method-assign]
    try:
        return train.main(flags)
    finally:
        command.build_pipeline, AsyncWriter.due = build, due  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
