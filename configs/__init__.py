"""Presets shipped with the package (yaml only)."""
