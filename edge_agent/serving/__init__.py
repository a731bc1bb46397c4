"""The one place that decides model-or-rules, and what it needs for that."""
