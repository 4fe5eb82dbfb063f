"""Is this sample, or this stream, foreign? NumPy only."""
