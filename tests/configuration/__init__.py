"""agent.yaml: what people mistype is named, with what they may have meant."""
