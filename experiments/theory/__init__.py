"""The papers' claims, checked on problems where the truth is known: `python -m experiments.theory`."""
