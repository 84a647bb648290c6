"""
A text classifier from Hugging Face
===================================

A small BERT, built from a config, tells two topics apart by their words. A third of the labels are
wrong. Batches are dicts, as tokenizers give them, padded to the longest sentence.
"""

import os

import matplotlib.pyplot as plt
import torch

import mts_fast

try:
    from transformers import BertConfig, BertForSequenceClassification
except ImportError as error:
    raise SystemExit("this example needs transformers: pip install 'mts_fast[examples]'") from error

STEPS = int(os.environ.get("STEPS", "80"))
WORDS, LENGTH, SENTENCES, VALIDATION = 40, 12, 1200, 100

# %%
# Sentences of 6 to 12 words, three of four from the 20 words of their topic.

torch.manual_seed(0)
truth = torch.randint(2, (SENTENCES + VALIDATION,))
mask = torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (len(truth), 1))
topic = torch.where(torch.rand(mask.shape) < 0.75, truth[:, None], 1 - truth[:, None])
ids = mask * (1 + WORDS // 2 * topic + torch.randint(WORDS // 2, mask.shape))
wrong = (torch.rand(len(ids)) < 1 / 3) & (torch.arange(len(ids)) < SENTENCES)
labels = torch.where(wrong, 1 - truth, truth)


def sentences(index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """A batch for the model."""
    return {"input_ids": ids[index], "attention_mask": mask[index].long()}


# %%
# A feature for the selector: the margin of a sentence's label under a linear classifier of bags of
# words, which is fitted to the clean sentences.

bags = torch.nn.functional.one_hot(ids, WORDS + 1).sum(1)[:, 1:].float()
clean = slice(SENTENCES, None)
logistic = torch.linalg.lstsq(bags[clean], 2.0 * truth[clean, None] - 1).solution
margin = (bags @ logistic)[:, 0] * (2 * labels - 1)
features = ((margin - margin.mean()) / margin.std())[:, None]

config = BertConfig(
    vocab_size=WORDS + 1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)
model = BertForSequenceClassification(config)
selector = mts_fast.Selector(num_features=4 + 1, num_classes=2)
step = mts_fast.MTSStep(
    model,
    torch.optim.AdamW(model.parameters(), lr=3e-3),
    selector,
    torch.optim.AdamW(selector.parameters(), lr=3e-3),
)
validation = {"val_inputs": sentences(clean), "val_labels": labels[clean]}
for _ in range(STEPS):
    i = torch.randint(SENTENCES, (128,))
    result = step(sentences(i), labels[i], features=features[i], **validation)
print(f"engine {result.engine}, validation loss {result.val_loss:.3f}")

pool = slice(SENTENCES)
weights = step.weights(
    sentences(pool), labels[pool], features=features[pool], val_inputs=sentences(clean)
)
parts = [weights[~wrong[pool]], weights[wrong[pool]]]
plt.hist(parts, 30, label=["right label", "wrong label"])
plt.xlabel("weight")
plt.legend()
plt.show()
