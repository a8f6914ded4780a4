"""Pre-training: settings, loop, step, optimiser."""
