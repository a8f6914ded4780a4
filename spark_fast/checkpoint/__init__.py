"""A run's checkpoints: written whole, validated before they are opened, kept and pruned, written in the background."""
