"""quantize-model: what it makes of models and data, good and bad."""
