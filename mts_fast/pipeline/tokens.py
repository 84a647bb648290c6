"""Texts as token ids, by the tokenizer beside the model."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from mts_fast._check import fail
from mts_fast.pipeline.data.findings import Findings
from mts_fast.pipeline.inputs import Texts
from mts_fast.pipeline.models import quiet


def tokenize(model: str, texts: Sequence[str], longest: int, findings: Findings) -> Texts:
    """Ids and mask of all texts; those of more than `longest` tokens are cut, with one remark.

    Raises:
        ValueError: the model has no tokenizer.
    """
    transformers = importlib.import_module("transformers")
    expected = "a model with a tokenizer"
    hint = "pass a folder or name of transformers that has one"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.removeprefix("transformers:"))
    except (OSError, ValueError, KeyError) as error:
        got = f"{model!r} ({str(error).splitlines()[0]})"
        fail(ValueError, "train", "--model", expected, got, hint)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        fail(ValueError, "train", "--model", expected, f"{model!r} without a vocabulary", hint)
    limit = min(longest, tokenizer.model_max_length)
    with quiet(transformers):  # its remark on long texts, which are counted here
        rows = tokenizer(list(texts))["input_ids"]
        long = [i for i, row in enumerate(rows) if len(row) > limit]
        cut = [texts[i] for i in long]
        for i, row in zip(
            long,
            tokenizer(cut, truncation=True, max_length=limit)["input_ids"] if cut else (),
            strict=True,
        ):
            rows[i] = row
    if long:
        remark = f"{len(long)} of {len(rows)} texts are longer than {limit} tokens and were cut"
        findings.remark(remark)
    width = max(len(row) for row in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return Texts(ids, mask)
