"""What is deployed agrees with the code: images, the desk, K3s."""
