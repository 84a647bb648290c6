"""Random worlds: models, losses, optimizers and options that an MTSStep is searched with."""
