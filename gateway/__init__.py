"""The gateway: an HTTP process that speaks to clients and an engine process that runs the model."""
