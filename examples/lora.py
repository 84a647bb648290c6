"""
LoRA on a frozen base
=====================

Adapters of rank 4 in the attention of a small GPT-2, whose base weights are frozen. Only the
adapters and the head have gradients, so row 6 of the algorithm is computed for them alone.
"""

import os

import matplotlib.pyplot as plt
import torch

import mts_fast

try:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import GPT2Config, GPT2ForSequenceClassification
except ImportError as error:
    raise SystemExit("this example needs peft: pip install 'mts_fast[examples]'") from error

STEPS = int(os.environ.get("STEPS", "80"))
WORDS, LENGTH, SENTENCES = 40, 10, 800

# %%
# Sentences of a class repeat one of its ten words; a third of the labels are wrong.

torch.manual_seed(0)
truth = torch.randint(4, (SENTENCES + 80,))
ids = torch.randint(WORDS, (len(truth), LENGTH))
ids[:, 1::2] = (truth * 10 + torch.randint(10, (len(truth),)))[:, None]
wrong = (torch.rand(len(truth)) < 1 / 3) & (torch.arange(len(truth)) < SENTENCES)
labels = torch.where(wrong, (truth + 1) % 4, truth)

config = GPT2Config(
    vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, num_labels=4, pad_token_id=WORDS - 1
)
base = GPT2ForSequenceClassification(config)
adapters = LoraConfig(TaskType.SEQ_CLS, r=4, target_modules=["c_attn"], fan_in_fan_out=True)
model = get_peft_model(base, adapters)
trained = [p for p in model.parameters() if p.requires_grad]
print(f"{sum(p.numel() for p in trained)} of {sum(p.numel() for p in model.parameters())} trained")

# %%
# The selector's feature is the model's current loss of the sample, which stays high where the label
# is wrong. It is computed before each step, in eval mode.


def losses(index: torch.Tensor | slice) -> torch.Tensor:
    """Cross-entropy [B, 1] of samples with their given labels, minus 1: roughly standardised."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids[index]).logits
    model.train()
    return torch.nn.functional.cross_entropy(logits, labels[index], reduction="none")[:, None] - 1


selector = mts_fast.Selector(num_features=4 + 1, num_classes=4)
step = mts_fast.MTSStep(
    model,
    torch.optim.AdamW(trained, lr=1e-2),
    selector,
    torch.optim.AdamW(selector.parameters(), lr=3e-3),
)
clean = slice(SENTENCES, None)
validation = {"val_inputs": {"input_ids": ids[clean]}, "val_labels": labels[clean]}
history = []
for _ in range(STEPS):
    i = torch.randint(SENTENCES, (128,))
    result = step({"input_ids": ids[i]}, labels[i], features=losses(i), **validation)
    parts = [result.weights[~wrong[i]].mean(), result.weights[wrong[i]].mean()]
    history.append([float(part / result.weights.mean()) for part in parts])
print(f"engine {result.engine}, validation loss {result.val_loss:.3f}")

plt.plot(history, label=["right label", "wrong label"])
plt.xlabel("step")
plt.ylabel("weight over mean weight")
plt.legend()
plt.show()
