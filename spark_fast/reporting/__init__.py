"""What a run tells of itself: log, metrics, TensorBoard, W&B, FLOPs and MFU, timers, profiles, pictures."""
