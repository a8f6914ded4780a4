"""Everything around one training step: settings, optimiser, ranks, checkpoints, the run folder."""
