"""HTTP and MQTT: equal, thin adapters over the inference service; one codec for both."""
