"""Training, evaluation and generation: the only place with flags, files, clocks and printing."""
