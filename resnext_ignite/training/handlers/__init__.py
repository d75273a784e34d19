"""The handlers of a training run; `attach.py` attaches them and defines their order."""
