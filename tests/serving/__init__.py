"""The service: who answers, and why."""
