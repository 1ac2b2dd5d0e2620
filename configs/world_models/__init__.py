"""Presets of ``simtoreal world-model train``: ``--config cpu``, ``--config gpu``, or a path; flags win."""
