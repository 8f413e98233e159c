"""Reference implementation of sparse neural-network training, without a deep-learning framework."""

__version__ = "0.1.0"
