"""Learned video world models, the third backend of the environment interface (not built yet)."""
