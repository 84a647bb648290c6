"""Text models of `foreign_models.FOREIGN`: encoders, decoders, both, experts, state spaces."""

from typing import Any

from foreign_models import CLASSES, Scale, enter_many
from foreign_options import (
    bart_like,
    bert_like,
    classifies,
    continues,
    gpt2_like,
    llama_like,
    t5_like,
    translates,
)

# grouped products have no float64, in which the check runs
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

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
        "gpt2": continues("GPT2", gpt2_like, task="LMHeadModel"),
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
            **EXPERTS,
        ),
        "qwen2_moe": continues(
            "Qwen2Moe",
            llama_like,
            num_experts=4,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            **EXPERTS,
        ),
        "switch_transformers": translates(
            "SwitchTransformers", t5_like, num_experts=2, num_sparse_encoder_layers=1
        ),
        "olmoe": continues(
            "Olmoe",
            llama_like,
            num_experts=4,
            **EXPERTS,
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
            "Mamba2",
            lambda s: {
                **mamba_like(s),
                "num_heads": s.width // 4,
                "head_dim": 8,
                "n_groups": 2,
                "chunk_size": 8,
            },
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
