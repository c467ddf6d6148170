"""What the services of Consilium share: configuration, errors, the wire, checkpoints and expert arithmetic."""

__version__ = "0.1.0"
