"""Task specifications shipped with the package (yaml only)."""
