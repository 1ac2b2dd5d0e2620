"""Policies: encoders, diffusion and regression policies, the trainer and checkpoints."""
