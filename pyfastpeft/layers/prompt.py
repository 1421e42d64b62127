"""Trained embeddings in front of a model's input (Lester et al. 2021)."""

from torch import Tensor, nn

from ..ops import checks


class PromptEmbedding(nn.Module):
    """V virtual tokens of width d, drawn from N(0, 1) as PEFT draws them.

    Args:
        num_virtual_tokens, token_dim: V and d.
        num_transformer_submodules: S; `weight` is [S * V, d]. PEFT keeps 2 V rows for an encoder and a decoder, and
            uses the first V.

    Raises ValueError naming the argument that does not fit.
    """

    def __init__(self, num_virtual_tokens: int, token_dim: int, num_transformer_submodules: int = 1):
        super().__init__()
        sizes = {
            "num_virtual_tokens": num_virtual_tokens,
            "token_dim": token_dim,
            "num_transformer_submodules": num_transformer_submodules,
        }
        for argument, size in sizes.items():
            checks.count("PromptEmbedding", argument, size)
        self.num_virtual_tokens = num_virtual_tokens
        self.weight = nn.Embedding(num_transformer_submodules * num_virtual_tokens, token_dim).weight

    def forward(self) -> Tensor:
        """The virtual tokens [V, d]."""
        return self.weight[: self.num_virtual_tokens]

    def prompt_embeddings(self) -> Tensor:
        """What PEFT stores: [S * V, d]."""
        return self.weight

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take the rows that PEFT stored, [S * V, d]. Raises ValueError or TypeError."""
        op = "PromptEmbedding.load_prompt_embeddings"
        checks.floating(op, "prompt_embeddings", prompt_embeddings)
        checks.shape(op, "prompt_embeddings", prompt_embeddings, tuple(self.weight.shape), "[V, d]")
        self.weight.data.copy_(prompt_embeddings)

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, token_dim={self.weight.shape[1]}"
