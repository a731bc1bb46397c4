"""Fallback rules."""
