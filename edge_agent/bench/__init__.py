"""The continual-learning benchmark: labelled sets, streams of tasks, metrics, runs, reports."""
