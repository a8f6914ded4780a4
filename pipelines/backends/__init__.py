"""What turns samples into batches on the device: CPU threads, nvJPEG, DALI, FFCV, or generated images."""
