"""From audio on disk to batches, on lhotse; knows nothing of models."""
