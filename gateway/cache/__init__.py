"""The expert-output cache: rows that the same expert has computed before are not computed again."""
