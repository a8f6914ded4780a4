"""What pre-training and fine-tuning share around their loops: folder, lock, ranks, watchdog, data parallelism."""
