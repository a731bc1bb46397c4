"""The services that others build: each file runs in an environment of its own and imports nothing of ours.

All get the path of the model in ``MODEL`` and the port in ``PORT``; onnxruntime has one thread, as ours.
"""
