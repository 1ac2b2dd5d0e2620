"""Evaluation: success statistics, paired comparison and reports."""
