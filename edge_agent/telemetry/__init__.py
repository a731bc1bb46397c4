"""Metrics, the durable queue, remote write, health and logs."""
