"""Demonstrations: scripted experts, recording, the dataset store and its exchange formats."""
