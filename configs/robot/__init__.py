"""Robots: topic names, frames, joints and staleness limits, one yaml each."""
