"""A small character-level GPT and its text, for gpt_ddp.py, gpt_ddp_audited.py and gpt_fsdp_audited.py."""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

# Sums, in an order that does not sort them. No download: every rank makes the same text.
TEXT = "\n".join(f"{a} and {b} make {a + b}" for a, b in ((i * 37 % 100, i * 59 // 100 % 100) for i in range(5000)))
LETTERS = sorted(set(TEXT))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TEXT])
SPLITS = {"train": TOKENS[:-8192], "val": TOKENS[-8192:]}
BATCH, CONTEXT, WIDTH, HEADS, LAYERS, DROPOUT = 8, 48, 48, 4, 2, 0.1


def get_batch(split, step, part):
    """Return what to read and what to predict: a pure function of its arguments."""
    tokens = SPLITS[split]
    generator = torch.Generator().manual_seed(1000 * step + part)
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
    windows = tokens[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Attention to what comes before, and a perceptron."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attend, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        """Add to each position what it draws from those before it."""
        heads = self.attend(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.dropout(self.join(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.think(self.norms[1](x)))


class GPT(nn.Module):
    """A transformer that predicts the next letter."""

    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, tokens, targets):
        """Return the loss of the predictions."""
        x = self.letters(tokens) + self.places.weight[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model):
    """Return the loss on the validation text; every rank computes it."""
    model.eval()
    loss = torch.stack([model(*get_batch("val", step, 0)) for step in range(8)]).mean().item()
    model.train()
    return loss


def fingerprint(model):
    """Return a digest of all bits of the parameters."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in whole)).hexdigest()[:12]
