"""Experiments, one a file: `config`, and what was reached with it in the docstring."""
