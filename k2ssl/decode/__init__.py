"""Searches over model outputs; imports torch and `k2ssl.batch` only."""
