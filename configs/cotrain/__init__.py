"""Presets of ``simtoreal cotrain``: ``--config wovr``, ``--config rlco``, ``--config wovr_smoke``; flags win."""
