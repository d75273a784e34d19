"""Several ranks: how they start (`launch`), agree (`ranks`, `stopping`), share a model (`ddp`), fail (`failures`)."""
