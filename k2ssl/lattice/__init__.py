"""Kernels, graphs and searches on k2: nothing else imports k2, and nothing here imports anything else of ours."""
