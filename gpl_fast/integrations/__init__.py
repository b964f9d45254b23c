"""Adapters for conventions of frameworks that arguments cannot meet; each module imports its
framework only when used."""
