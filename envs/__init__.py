"""Environments: the one interface, task specifications, robots and the MuJoCo backend."""
