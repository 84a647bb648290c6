"""All kinds of `foreign_models.FOREIGN`: texts, and here vision, audio, adapters and
parametrized weights."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import foreign_texts  # noqa: F401, enters its kinds
import torch
from foreign_models import (
    CLASSES,
    Foreign,
    Scale,
    enter_many,
    images,
    next_token_loss,
    of_transformers,
)
from foreign_options import (
    bart_like,
    bert_like,
    classifies,
    continues,
    gpt2_like,
    hears,
    llama_like,
    sees,
    vit_like,
    wav2vec_like,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations


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


def after_prompt(output: Any, labels: Tensor) -> Tensor:
    """`next_token_loss` where virtual tokens stand before the others."""
    return next_token_loss(SimpleNamespace(logits=output.logits[:, -labels.shape[1] :]), labels)


def adapted(make: Callable[[Scale], Foreign], kind: str, loss: Any = None, **options: Any):
    """A model with an adapter of peft; the rest of it is frozen."""

    def build(s: Scale) -> Foreign:
        import peft

        base = make(s)
        config = getattr(peft, kind)(**options)
        model = peft.get_peft_model(base.model, config)
        return Foreign(model.train(), base.batch, loss or base.loss)

    return build


_bert = classifies("Bert", bert_like)
_gpt2 = continues("GPT2", gpt2_like, task="LMHeadModel")
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
            _llama,
            "PromptTuningConfig",
            after_prompt,
            num_virtual_tokens=3,
            task_type="CAUSAL_LM",
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

        return Foreign(model, batch)

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
