"""Who turns samples into batches on the device: threads, nvJPEG, DALI, FFCV, or generated images."""
