"""Texts for the demo model, and how far one model's predictions are from another's on them."""

import random

import torch


def texts(tokenizer, rows=8, width=64):
    """Questions of the kind that the demo model answers, from its own corpus' seed."""
    draw = random.Random(0)
    said = "".join(f"What is {draw.randint(1, 99)} + {draw.randint(1, 99)}?\n" for _ in range(rows * width))
    ids = tokenizer(said, add_special_tokens=False)["input_ids"][: rows * (width - 1)]
    rows_of = torch.tensor(ids).view(rows, width - 1)
    return torch.cat((torch.full((rows, 1), tokenizer.bos_token_id), rows_of), dim=1)


@torch.no_grad()
def divergence(exact, model, ids):
    a, b = (m(ids).logits.float().log_softmax(-1) for m in (exact, model))
    return float((a.exp() * (a - b)).sum(-1).mean())
