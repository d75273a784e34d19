"""Side by side with what one would use instead: a module for each suite; the command is `__main__.py`."""
