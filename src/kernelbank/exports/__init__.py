"""Models as files that run without this library, in ONNX and torch.export, each compared with its model."""
