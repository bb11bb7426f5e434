"""Who answers. Import pbrl.types and nothing else of pbrl."""
