"""The demo, its model, its data and the script that trains it."""
