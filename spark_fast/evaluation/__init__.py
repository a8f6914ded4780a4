"""What a pre-trained encoder is worth: nearest neighbours, a linear probe, fine-tuning."""
