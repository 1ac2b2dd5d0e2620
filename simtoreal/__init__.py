"""Top level of simtoreal: the command line and the pipeline that chains the stages."""

__version__ = "0.1.0"
