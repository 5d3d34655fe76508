"""Training losses: tensors in, sums and counts out."""
