"""`consilium doctor`: what the way to every worker and its experts take, and whether splitting the model pays."""
