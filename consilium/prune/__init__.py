"""Drops or merges the least used experts of every layer, by recorded load: `consilium prune`."""
