"""`--profile`: a few steps as torch's profiler sees them, in the run folder. Training goes on during and after it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("spark_fast")

FIRST, LAST = 5, 8  # steps of this process that are recorded; the one before warms the profiler up


class Profile:
    """Records some steps of this process.

    Args:
        folder: the run folder; None: nothing is recorded.
        step: where this process begins.
    """

    def __init__(self, folder: Path | None, device: torch.device, step: int) -> None:
        self._folder, self._begun, self._done = folder, step, 0
        self._profiler: profile | None = None
        if folder is not None:
            gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *gpu],
                schedule=schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()

    def advance(self) -> None:
        """One step is done."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()  # writes after the last step recorded
        if self._done == LAST:
            self.close()

    def close(self) -> None:
        """Stop; what was recorded of a run that ends earlier is written."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if self._done < FIRST:
            log.warning("--profile: the run ended after %d steps, and recording begins at step %d", self._done, FIRST)

    def _write(self, profiler: profile) -> None:
        if self._folder is None or self._done < FIRST:
            return
        first, last = self._begun + FIRST, self._begun + self._done
        path = self._folder / "profile" / f"steps_{first}-{last}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.warning("--profile: %s cannot be written (%s); training continues", path, error)
            return
        print(f"profile of steps {first} to {last}: {path}; open it at https://ui.perfetto.dev", flush=True)
