"""One module per command-line verb: a ``Config`` dataclass (the flags) and ``main(config)``."""
