"""What a run reports: log, metrics, TensorBoard, W&B, FLOPs and MFU, timers, profiles, pictures."""
