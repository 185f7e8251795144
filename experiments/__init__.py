"""The paper's smaller claims, measured: a script each, run as `python -m experiments.NAME`."""
