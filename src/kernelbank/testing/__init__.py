"""What tests and benchmarks of the models share: a pytest plugin for timm's suite, and small models."""
