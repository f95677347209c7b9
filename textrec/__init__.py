"""textrec: a reproducibility study of text-based sequential recommendation."""

__version__ = "0.1.0"
