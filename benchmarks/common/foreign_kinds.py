"""The kinds of models of `foreign_models.FOREIGN`, family by family."""

from collections.abc import Callable
from typing import Any

import torch
from foreign_models import (
    CLASSES,
    Foreign,
    Scale,
    enter_many,
    images,
    next_token_loss,
    of_transformers,
    pairs,
    sequences,
    token_loss,
    tokens,
    waves,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

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


enter_many(
    "text encoder",
    {
        "bert": classifies("Bert", bert_like),
        "roberta": classifies("Roberta", bert_like),
        "electra": classifies("Electra", bert_like),
        "albert": classifies("Albert", bert_like, embedding_size=16),
        "distilbert": classifies(
            "DistilBert",
            lambda s: {
                "vocab_size": s.vocabulary,
                "dim": s.width,
                "n_layers": s.layers,
                "n_heads": s.heads,
                "hidden_dim": s.inner,
                "num_labels": CLASSES,
            },
        ),
        "deberta": classifies(
            "Deberta",
            bert_like,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            max_relative_positions=8,
        ),
        "deberta_v2": classifies(
            "DebertaV2",
            bert_like,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        "mpnet": classifies("MPNet", bert_like),
        "roformer": classifies("RoFormer", bert_like),
        "convbert": classifies("ConvBert", bert_like, conv_kernel_size=3, embedding_size=32),
        "fnet": classifies("FNet", bert_like, tpu_short_seq_length=16),
        "esm": classifies("Esm", bert_like, position_embedding_type="rotary", mask_token_id=3),
        "funnel": classifies(
            "Funnel",
            lambda s: {
                "vocab_size": s.vocabulary,
                "block_sizes": [1, 1],
                "d_model": s.width,
                "n_head": s.heads,
                "d_head": s.width // s.heads,
                "d_inner": s.inner,
                "num_labels": CLASSES,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                "num_decoder_layers": 1,
            },
        ),
        "xlnet": classifies(
            "XLNet",
            lambda s: {
                "vocab_size": s.vocabulary,
                "d_model": s.width,
                "n_layer": s.layers,
                "n_head": s.heads,
                "d_inner": s.inner,
                "num_labels": CLASSES,
                "dropout": 0.0,
                "summary_last_dropout": 0.0,
                "use_mems_eval": False,
                "use_mems_train": False,
            },
        ),
        "modernbert": classifies(
            "ModernBert",
            lambda s: {
                **llama_like(s),
                "num_labels": CLASSES,
                "local_attention": 8,
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
        ),
    },
)
enter_many(
    "decoder",
    {
        "gpt2": continues(
            "GPT2",
            lambda s: {
                "vocab_size": s.vocabulary,
                "n_positions": 4 * s.length,
                "n_embd": s.width,
                "n_layer": s.layers,
                "n_head": s.heads,
                "use_cache": False,
            },
            task="LMHeadModel",
        ),
        "gpt_neox": continues("GPTNeoX", llama_like),
        "opt": continues(
            "OPT",
            lambda s: {
                **llama_like(s),
                "ffn_dim": s.inner,
                "word_embed_proj_dim": s.width,
                "dropout": 0.0,
            },
        ),
        "bloom": continues(
            "Bloom",
            lambda s: {
                "vocab_size": s.vocabulary,
                "hidden_size": s.width,
                "n_layer": s.layers,
                "n_head": s.heads,
                "use_cache": False,
            },
        ),
        "llama": continues("Llama", llama_like),
        "mistral": continues("Mistral", llama_like),
        "qwen2": continues("Qwen2", llama_like),
        "qwen3": continues("Qwen3", llama_like),
        "phi": continues("Phi", llama_like),
        "falcon": continues(
            "Falcon",
            lambda s: {
                "vocab_size": s.vocabulary,
                "hidden_size": s.width,
                "num_hidden_layers": s.layers,
                "num_attention_heads": s.heads,
                "use_cache": False,
            },
        ),
        "gemma": continues("Gemma", llama_like),
        "gemma2": continues("Gemma2", llama_like, attn_implementation="eager", sliding_window=8),
        "cohere": continues("Cohere", llama_like),
        "olmo2": continues("Olmo2", llama_like),
        "stablelm": continues("StableLm", llama_like),
        "nemotron": continues("Nemotron", llama_like),
    },
)
enter_many(
    "encoder-decoder",
    {
        "t5": translates("T5", t5_like),
        "umt5": translates("UMT5", t5_like),
        "bart": translates("Bart", bart_like),
        "pegasus": translates("Pegasus", bart_like),
        "m2m100": translates("M2M100", bart_like),
    },
)
enter_many(
    "mixture of experts",
    {
        "mixtral": continues(
            "Mixtral",
            llama_like,
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
        ),
        "qwen2_moe": continues(
            "Qwen2Moe",
            llama_like,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            experts_implementation="eager",
        ),
        "switch_transformers": translates(
            "SwitchTransformers", t5_like, num_experts=2, num_sparse_encoder_layers=1
        ),
        "olmoe": continues(
            "Olmoe",
            llama_like,
            num_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
        ),
    },
)


def mamba_like(s: Scale) -> dict[str, Any]:
    """Options as Mamba's configuration names them."""
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "state_size": 8,
        "time_step_rank": 4,
        "use_cache": False,
    }


enter_many(
    "state space",
    {
        "mamba": continues("Mamba", mamba_like),
        "mamba2": continues(
            "Mamba2", mamba_like, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
        ),
        "falcon_mamba": continues("FalconMamba", mamba_like),
        "rwkv": continues(
            "Rwkv",
            lambda s: {
                "vocab_size": s.vocabulary,
                "hidden_size": s.width,
                "num_hidden_layers": s.layers,
                "context_length": 4 * s.length,
                "use_cache": False,
            },
        ),
    },
)


def swin_like(s: Scale) -> dict[str, Any]:
    """Options as Swin's configuration names them."""
    return {
        "image_size": s.pixels,
        "patch_size": 2,
        "embed_dim": s.width // 2,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
        "num_labels": CLASSES,
        "drop_path_rate": 0.0,
    }


enter_many(
    "vision",
    {
        "vit": sees("ViT", vit_like),
        "deit": sees("DeiT", vit_like),
        "beit": sees(
            "Beit",
            vit_like,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=False,
            drop_path_rate=0.0,
        ),
        "dinov2": sees("Dinov2", vit_like, drop_path_rate=0.0),
        "swin": sees("Swin", swin_like),
        "swinv2": sees("Swinv2", swin_like),
        "convnextv2": sees(
            "ConvNextV2",
            lambda s: {
                "hidden_sizes": [s.width // 2, s.width],
                "depths": [1, 1],
                "num_stages": 2,
                "patch_size": 2,
                "num_labels": CLASSES,
                "drop_path_rate": 0.0,
            },
        ),
        "bit": sees(
            "Bit",
            lambda s: {
                "embedding_size": s.width,
                "hidden_sizes": [s.width, s.width],
                "depths": [1, 1],
                "num_groups": 4,
                "num_labels": CLASSES,
            },
        ),
        "segformer": sees(
            "Segformer",
            lambda s: {
                "num_encoder_blocks": 2,
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [s.width // 2, s.width],
                "patch_sizes": [3, 3],
                "strides": [2, 2],
                "num_attention_heads": [2, 2],
                "mlp_ratios": [2, 2],
                "num_labels": CLASSES,
                "drop_path_rate": 0.0,
            },
        ),
    },
)


def spectrograms(s: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """Mel spectrograms and classes."""

    def batch(size: int) -> tuple[Any, Tensor]:
        return {"input_values": torch.randn(size, s.frames, 16)}, torch.arange(size) % CLASSES

    return batch


def mels(s: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """The same with the bands before the frames."""

    def batch(size: int) -> tuple[Any, Tensor]:
        return {"input_features": torch.randn(size, 16, s.frames)}, torch.arange(size) % CLASSES

    return batch


enter_many(
    "audio",
    {
        "wav2vec2": hears("Wav2Vec2", wav2vec_like),
        "hubert": hears("Hubert", wav2vec_like),
        "wavlm": hears("WavLM", wav2vec_like, num_buckets=8, max_bucket_distance=16),
        "audio_spectrogram_transformer": lambda s: Foreign(
            of_transformers(
                "AST",
                "ForAudioClassification",
                **{k: v for k, v in vit_like(s).items() if k != "image_size"}
                | {"patch_size": 4, "num_mel_bins": 16, "max_length": s.frames},
            ),
            spectrograms(s),
        ),
        "whisper": lambda s: Foreign(
            of_transformers(
                "Whisper",
                "ForAudioClassification",
                **bart_like(s)
                | {
                    "num_mel_bins": 16,
                    "max_source_positions": s.frames // 2,
                    "max_target_positions": s.length,
                    "num_labels": CLASSES,
                    "classifier_proj_size": s.width,
                },
            ),
            mels(s),
        ),
    },
)


def adapted(make: Callable[[Scale], Foreign], kind: str, **options: Any):
    """A model with an adapter of peft; the rest of it is frozen."""

    def build(s: Scale) -> Foreign:
        import peft

        base = make(s)
        config = getattr(peft, kind)(**options)
        return Foreign(peft.get_peft_model(base.model, config).train(), base.batch, base.loss)

    return build


_bert = classifies("Bert", bert_like)
_gpt2 = continues(
    "GPT2",
    lambda s: {
        "vocab_size": s.vocabulary,
        "n_positions": 4 * s.length,
        "n_embd": s.width,
        "n_layer": s.layers,
        "n_head": s.heads,
        "use_cache": False,
    },
    task="LMHeadModel",
)
_llama = continues("Llama", llama_like)
enter_many(
    "adapter",
    {
        "lora": adapted(_gpt2, "LoraConfig", r=4, task_type="CAUSAL_LM"),
        "dora": adapted(_llama, "LoraConfig", r=4, use_dora=True, target_modules=["q_proj"]),
        "ia3": adapted(_bert, "IA3Config", task_type="SEQ_CLS"),
        "prefix_tuning": adapted(
            _llama, "PrefixTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM"
        ),
        "prompt_tuning": adapted(
            _llama, "PromptTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM"
        ),
        "oft": adapted(_llama, "OFTConfig", oft_block_size=8, target_modules=["q_proj"]),
        "vera": adapted(_llama, "VeraConfig", r=4, target_modules=["q_proj"]),
        "loha": adapted(_llama, "LoHaConfig", r=4, target_modules=["q_proj"]),
    },
)


def normalized(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Scale], Foreign]:
    """A convolutional net whose weights are parametrized."""

    def build(s: Scale) -> Foreign:
        model = nn.Sequential(
            wrap(nn.Conv2d(3, s.width, 3, 2)),
            nn.GELU(),
            wrap(nn.Conv2d(s.width, s.width, 3, 2)),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            wrap(nn.Linear(4 * s.width, CLASSES)),
        )

        def batch(size: int) -> tuple[Any, Tensor]:
            inputs, labels = images(s)(size)
            return inputs["pixel_values"], labels

        return Foreign(model.train(), batch)

    return build


def _spectral(module: nn.Module) -> nn.Module:
    """Spectral norm whose power iteration stands still, as in eval mode."""
    return parametrizations.spectral_norm(module).eval()


def _old_weight_norm(module: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(module)


enter_many(
    "parametrization",
    {
        "weight_norm": normalized(parametrizations.weight_norm),
        "spectral_norm": normalized(_spectral),
        "weight_norm_by_hook": normalized(_old_weight_norm),
        "orthogonal": normalized(parametrizations.orthogonal),
    },
)
