"""Which adapter to train for a task, decided before training anything."""
