"""The formats: what they refuse, and that reading gives back what was written."""
