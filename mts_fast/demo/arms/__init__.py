"""The arms of the comparison: what each is trained on."""
