"""The way back: plan, fetch, verify, and files for other programs."""
