"""Models that posteriors' tests import, and that its archive leaves out."""

import torch
from torch import nn


class TestModel(nn.Module):
    """Ten numbers to one."""

    __test__ = False

    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(10, 1)

    def forward(self, x):
        return self.layers(x)


class TestLanguageModel(nn.Module):
    """Logits of the next token, in a dict."""

    __test__ = False

    def __init__(self, vocab_size=1000, embedding_dim=256, hidden_dim=512):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.hidden = nn.Linear(embedding_dim, hidden_dim)
        self.logits = nn.Linear(hidden_dim, vocab_size)

    def forward(self, input_ids, attention_mask):
        hidden = torch.tanh(self.hidden(self.embedding(input_ids)))
        return {"logits": self.logits(hidden * attention_mask[..., None])}
