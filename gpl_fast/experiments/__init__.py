"""The papers' experiments, run small."""
