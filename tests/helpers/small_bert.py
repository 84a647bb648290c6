"""A folder of transformers that needs no download."""

import json


def write_bert(folder):
    """A BERT of one layer, its vocabulary of letters, and no weights."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = {
        **{"model_type": "bert", "vocab_size": len(words), "hidden_size": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        "max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "BertTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder
