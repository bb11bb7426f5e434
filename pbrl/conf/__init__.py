"""Hydra configuration groups of `python -m pbrl.train`."""
