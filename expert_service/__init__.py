"""The expert service: holds some experts of a model and computes them for gateways."""
