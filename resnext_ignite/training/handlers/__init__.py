"""The handlers of a run; `attach.py` attaches them and decides their order."""
