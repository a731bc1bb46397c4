"""The atomic model store: what is installed, and which release answers."""
