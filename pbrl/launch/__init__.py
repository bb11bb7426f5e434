"""Above the loop: from a command line to parts that are ready to run."""
