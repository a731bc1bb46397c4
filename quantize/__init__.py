"""The workstation: FP32 ONNX model to signed-ready INT8 bundle. The files are the steps, in order."""
