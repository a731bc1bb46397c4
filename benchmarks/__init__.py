"""What the tables of docs/benchmarks.md are made with: ``make bench``."""
