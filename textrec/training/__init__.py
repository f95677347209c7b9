"""Losses, loops and checkpoints: the place where models, data and evaluation meet."""
