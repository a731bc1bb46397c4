"""Fallback rules: parse and evaluate. Pure: no I/O, no clock, no logging."""
