"""Optimizers and learning-rate schedules; imports nothing else of k2ssl."""
