"""How often random worlds have which layer, by the kind of their inputs."""

# kind -> weight, by what the activations are; the first ones are what hypothesis shrinks to
ANYWHERE = {
    "linear": 30,
    "activation": 14,
    "mlp": 12,
    "layer_norm": 10,
    "dropout": 7,
    "rms_norm": 8,
    "scale": 4,
    "shift": 4,
    "matmul": 8,
    "einsum": 8,
    "tied": 7,
    "lora": 9,
    "experts": 8,
    "branch": 6,
    "numpy_dropout": 8,
    "python_dropout": 6,
    "reversal": 8,
    "detach": 6,
    "running_centre": 10,
    "unused": 5,
    "checkpoint": 7,
    "merged": 8,
    "routed": 10,
    "one_plus": 6,
    "weight_norm": 6,
}
IMAGES = {
    "conv": 40,
    "activation": 15,
    "group_norm": 10,
    "batch_norm": 30,
    "conv_residual": 14,
    "conv_transpose": 16,
    "instance_norm": 18,
    "dropout": 5,
    "dropout_channels": 12,
    "scale": 5,
    "shift": 4,
    "unused": 2,
}
LAYERS: dict[str, dict[str, int]] = {
    "vector": {**ANYWHERE, "batch_norm": 14, "group_norm": 5, "addmm": 17},
    "image": IMAGES,
    "signal": IMAGES,
    "sequence": {
        **ANYWHERE,
        "attention": 25,
        "encoder": 25,
        "positions": 26,
        "causal_attention": 12,
        "over_time": 15,
        "decay": 12,
        "relative_bias": 14,
    },
}
LAYERS["tokens"] = LAYERS["sequence"]
# layers for the odd worlds: weights made of parameters, couplings, recurrent layers
ODD_ANYWHERE = {
    "exp_scale": 45,
    "one_plus": 39,
    "weight_norm": 55,
    "spectral_norm": 85,
    "symmetric": 56,
    "ternary": 100,
    "mixup": 30,
    "batch_centred": 36,
}
ODD_IMAGES = {"exp_scale": 22, "one_plus": 22, "mixup": 30, "batch_centred": 30, "batch_norm": 60}
ODD: dict[str, dict[str, int]] = {
    "vector": ODD_ANYWHERE,
    "image": ODD_IMAGES,
    "signal": ODD_IMAGES,
    "sequence": {**ODD_ANYWHERE, "class_token": 200, "gru": 240, "lstm": 420},
}
ODD["tokens"] = ODD["sequence"]
# layers with parameters that a plain step trains
TRAINED = {
    "linear", "mlp", "matmul", "einsum", "addmm", "tied", "experts", "attention", "encoder",
    "causal_attention", "merged", "conv", "conv_residual", "conv_transpose", "gru", "lstm",
    "over_time",
}  # fmt: skip
# layers after which autograd's gradient is not the derivative of the forward
ESTIMATORS = {"ternary", "reversal", "detach"}
MIXING = {"mixup", "batch_centred"}
RECURRENT = {"gru", "lstm"}
