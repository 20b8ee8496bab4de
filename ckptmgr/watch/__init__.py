"""Checkpoints that other programs write as files, adopted as committed steps. Nothing in them is
ever unpickled or run.
"""
