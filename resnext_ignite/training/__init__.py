"""Training and evaluating: the two engines, what they count, and the handlers around them."""
