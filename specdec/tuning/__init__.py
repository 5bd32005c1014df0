"""Trees that fit a device: what a pass costs, what a drafter gets right, and the tree that makes the most of both."""
