"""Which stock models can be pruned: found, tried in processes of their own, written as a page."""
