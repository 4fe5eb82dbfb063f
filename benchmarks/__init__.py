"""One file a claim; each writes its results, with machine, versions and seed, to `results/`."""
