"""What `benchmark` measures: operations and whole models, each beside its bound and its peers."""
