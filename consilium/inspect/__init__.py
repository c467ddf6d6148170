"""`consilium inspect`: what a model is, what it takes, and where it fits, without reading a weight. Free of torch.

``parts`` (every tensor that config.json implies) → ``served`` (their bytes in each arithmetic) → ``split`` (which
machine could hold what); ``stored`` (what the files' headers say); ``report`` (all of it, as JSON and for people).
"""
