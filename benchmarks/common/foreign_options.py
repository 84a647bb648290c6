"""Options of configurations, and models made of them, by what they are given."""

from collections.abc import Callable
from typing import Any

from foreign_models import (
    CLASSES,
    Foreign,
    Scale,
    images,
    next_token_loss,
    of_transformers,
    pairs,
    sequences,
    token_loss,
    tokens,
    waves,
)

Options = Callable[[Scale], dict[str, Any]]


def bert_like(s: Scale) -> dict[str, Any]:
    """Options as BERT's configuration names them."""
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.inner,
        "max_position_embeddings": 4 * s.length,
        "num_labels": CLASSES,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def gpt2_like(s: Scale) -> dict[str, Any]:
    """Options as GPT-2's configuration names them."""
    return {
        "vocab_size": s.vocabulary,
        "n_positions": 4 * s.length,
        "n_embd": s.width,
        "n_layer": s.layers,
        "n_head": s.heads,
        "use_cache": False,
    }


def llama_like(s: Scale) -> dict[str, Any]:
    """Options as LLaMA's configuration names them."""
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads // 2,
        "head_dim": s.width // s.heads,
        "intermediate_size": s.inner,
        "max_position_embeddings": 4 * s.length,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        "use_cache": False,
    }


def bart_like(s: Scale) -> dict[str, Any]:
    """Options as BART's configuration names them."""
    return {
        "vocab_size": s.vocabulary,
        "d_model": s.width,
        "encoder_layers": s.layers,
        "decoder_layers": s.layers,
        "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads,
        "encoder_ffn_dim": s.inner,
        "decoder_ffn_dim": s.inner,
        "max_position_embeddings": 4 * s.length,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "dropout": 0.0,
        "use_cache": False,
    }


def t5_like(s: Scale) -> dict[str, Any]:
    """Options as T5's configuration names them."""
    return {
        "vocab_size": s.vocabulary,
        "d_model": s.width,
        "d_kv": s.width // s.heads,
        "d_ff": s.inner,
        "num_layers": s.layers,
        "num_heads": s.heads,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "use_cache": False,
    }


def vit_like(s: Scale) -> dict[str, Any]:
    """Options as ViT's configuration names them."""
    return {
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.inner,
        "image_size": s.pixels,
        "patch_size": s.pixels // 4,
        "num_labels": CLASSES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def wav2vec_like(s: Scale) -> dict[str, Any]:
    """Options as wav2vec 2.0's configuration names them."""
    return {
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.inner,
        "conv_dim": [s.width] * 3,
        "conv_kernel": [10, 4, 3],
        "conv_stride": [8, 4, 2],
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "num_labels": CLASSES,
        "classifier_proj_size": s.width,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
    }


def classifies(name: str, options: Options, task: str = "ForSequenceClassification", **more: Any):
    """Texts with a mask -> classes."""
    return lambda s: Foreign(of_transformers(name, task, **options(s) | more), tokens(s))


def continues(name: str, options: Options, task: str = "ForCausalLM", **more: Any):
    """Texts -> their next tokens."""
    return lambda s: Foreign(
        of_transformers(name, task, **options(s) | more), sequences(s), next_token_loss
    )


def translates(name: str, options: Options, task: str = "ForConditionalGeneration", **more: Any):
    """Texts -> other texts."""
    return lambda s: Foreign(of_transformers(name, task, **options(s) | more), pairs(s), token_loss)


def sees(name: str, options: Options, task: str = "ForImageClassification", **more: Any):
    """Images -> classes."""
    return lambda s: Foreign(of_transformers(name, task, **options(s) | more), images(s))


def hears(name: str, options: Options, task: str = "ForSequenceClassification", **more: Any):
    """Sound -> classes."""
    return lambda s: Foreign(of_transformers(name, task, **options(s) | more), waves(s))
