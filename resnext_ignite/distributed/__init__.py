"""Training on several ranks: start (`launch`), agreement (`ranks`, `stopping`), model (`ddp`), errors (`failures`)."""
