"""The stages: wiring only."""
