"""Metrics, logs, health, the durable queue and remote write."""
