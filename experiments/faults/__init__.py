"""What happens to a run when something breaks: `python -m experiments.faults` breaks it and writes the table."""
