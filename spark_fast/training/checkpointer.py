"""When a run is saved, and what the thread that writes the checkpoint does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spark_fast.checkpoint.async_writer import AsyncWriter
from spark_fast.checkpoint.file import Content
from spark_fast.checkpoint.manager import CHECKPOINT, CheckpointManager
from spark_fast.training.run_state import RunState


class Checkpointer:
    """Saves a run in the background: a step is held up by the copy to host memory alone.

    Args:
        manager: of the run folder; None on ranks that do not write.
        steps, seconds: between saves in mid-epoch; 0: not by this.
        after_epoch: called by the writing thread with a checkpoint that an epoch's end has left.
    """

    def __init__(
        self,
        state: RunState,
        manager: CheckpointManager | None,
        *,
        steps: int = 0,
        seconds: float = 0.0,
        after_epoch: Callable[[Content], None] = lambda content: None,
    ) -> None:
        self.state, self.manager, self.steps = state, manager, steps
        self._after_epoch = after_epoch
        self._writer = AsyncWriter(steps, seconds, begun=state.position.step)

    @property
    def last(self) -> Path | None:
        """Where the last checkpoint is; None on ranks that do not write."""
        return None if self.manager is None else self.manager.folder / CHECKPOINT

    def due(self) -> bool:
        """Whether a save in mid-epoch is due on this rank."""
        return self.manager is not None and self._writer.due(self.state.position.step)

    def save(self) -> None:
        """Copy the state and have it written; on all ranks together."""
        manager, at = self.manager, self.state.position
        if manager is None:
            self.state.gather(keep=False)
            return
        self._writer.begin(at.step)
        content, step, epoch_ended = self.state.gather(keep=True), at.step, at.at_epoch_end

        def write() -> None:
            manager.write(step, content)
            if epoch_ended:
                self._after_epoch(content)

        self._writer.submit(write)

    def finish(self) -> None:
        """Return when the last save is on the disk; one that failed is tried once more.

        Raises:
            CheckpointError: it failed again.
        """
        self._writer.finish()

    def wait(self) -> None:
        """Return when no write is in flight, whatever became of it."""
        self._writer.wait()
