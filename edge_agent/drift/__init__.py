"""Drift detection against the baseline of the bundle. Pure, constant memory."""
