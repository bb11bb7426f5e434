"""Which second term can be seen at which size: exact problems, and rollouts of trained policies."""
