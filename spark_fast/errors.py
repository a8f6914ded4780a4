"""The exceptions of the project, and the exit code of a command that ends with one.

0 done, 2 settings, 3 data, 4 loss not finite, 5 stalled or another rank lost, 6 storage or checkpoint, 75 interrupted
and saved (0 under torchrun, see `run.command`), 130 Ctrl-C with nothing to save. Of the tools (`cli.tool`) also 141:
nobody reads the output any more.
"""

from __future__ import annotations

STALLED = 5  # exit code of a process that its own watchdog ends
CTRL_C = 130  # exit code of what Ctrl-C ended without anything to save, as a shell has it for SIGINT
INTERRUPTED = 75  # exit code: stopped before the end, everything is saved; Slurm and others requeue by it


class SparkFastError(Exception):
    """The base of all of them; the message says what was found, with the value, and what to do."""

    exit_code = 1


class SettingsError(SparkFastError):
    """A setting that cannot be used, makes no sense, or would destroy something."""

    exit_code = 2


class DataError(SparkFastError):
    """The data cannot be used; the message says what was found where."""

    exit_code = 3


class NotFiniteError(SparkFastError):
    """The loss or the gradient was not finite for too many steps in a row."""

    exit_code = 4


class LostRankError(SparkFastError):
    """Another rank is gone."""

    exit_code = STALLED


class StorageError(SparkFastError):
    """Writing failed; the message says what was kept."""

    exit_code = 6


class CheckpointError(StorageError):
    """A checkpoint that cannot be written, read or used; the message names the file."""


class MisfitError(CheckpointError):
    """A sound checkpoint, of another model or run than the settings say."""

    exit_code = SettingsError.exit_code


class ImageError(Exception):
    """One image cannot be read; the message is the reason. A pipeline substitutes the image and counts it."""
