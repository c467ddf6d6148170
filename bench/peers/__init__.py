"""The peers, measured on this machine by `python -m bench.peers`: one alone or all, each repeated."""
