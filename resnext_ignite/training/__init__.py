"""Training and evaluation: the two engines, their metrics, and the handlers around them."""
