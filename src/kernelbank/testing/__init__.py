"""Pytest plugins for tests of the models."""
