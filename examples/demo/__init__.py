"""The whole job on real handwritten digits: `python -m examples.demo`."""
