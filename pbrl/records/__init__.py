"""Below the loop: what a run writes down and measures. Checkpoints, metrics, videos, evaluations."""
