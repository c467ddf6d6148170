"""The router: who is alive, and who shall hold which expert. Never on the token path."""
