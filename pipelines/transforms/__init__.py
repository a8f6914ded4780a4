"""What happens to an image: decoding, cropping, resizing, normalising, on the host or the device."""
