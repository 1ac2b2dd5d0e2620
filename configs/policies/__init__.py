"""Presets of ``simtoreal train``: give one with ``--config``; flags on the command line win."""
