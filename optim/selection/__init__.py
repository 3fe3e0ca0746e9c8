"""Which parameters train: LISA, half fine-tuning and TensorSelector, over any optimizer."""
