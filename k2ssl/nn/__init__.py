"""Pure torch mechanisms, one per file; imports nothing else of k2ssl."""
