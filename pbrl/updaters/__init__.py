"""How answers become a better reward: one file per method, none imports another."""
