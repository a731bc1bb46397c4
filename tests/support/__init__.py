"""What tests of several areas need: the real services they talk to."""
