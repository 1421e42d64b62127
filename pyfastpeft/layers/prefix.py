"""Key and value rows that every layer's attention sees in front of its own (Li and Liang 2021)."""

import torch
from torch import Tensor, nn

from ..ops import checks


class PrefixEncoder(nn.Module):
    """The prefix of all layers: V key rows and V value rows for each of L layers, H heads wide, D numbers a head.

    Without a projection, rows[l] [V, 2 H D] is trained itself. With one (the paper's section 4.3), layer l's rows are

        tanh(E W^T + c) W_l^T + b_l        E [V, H D], W [M, H D], W_l [2 H D, M]

    and `bake` throws the MLP away afterwards. W_l is one parameter for each layer, so that a layer forms its own rows
    and nothing is handed from one layer to the next: gradient checkpointing of either kind needs no special case, and
    only the V rows of tanh(...) are formed L times, never those of W_l, and nothing once for each row of a batch.

    Args:
        num_virtual_tokens, num_layers, num_heads, head_dim: V, L, H (of the keys, where queries are grouped) and D.
        encoder_hidden_size: M, the width of the MLP; None: no projection.
        init_weights: None draws everything from PEFT's distributions in PEFT's order; "zero" has rows of zeros.
        num_transformer_submodules: S; layer l gets rows[S l modulo L], as in PEFT, which has S = 2 for the decoders of
            encoder-decoders.

    Raises ValueError naming the argument that does not fit.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        encoder_hidden_size: int | None = None,
        init_weights: str | None = None,
        num_transformer_submodules: int = 1,
    ):
        super().__init__()
        sizes = {
            "num_virtual_tokens": num_virtual_tokens,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "encoder_hidden_size": 1 if encoder_hidden_size is None else encoder_hidden_size,
            "num_transformer_submodules": num_transformer_submodules,
        }
        op = "PrefixEncoder"
        for argument, size in sizes.items():
            checks.count(op, argument, size)
        checks.need_value(init_weights in (None, "zero"), op, "init_weights", init_weights, 'None or "zero"')
        self.num_virtual_tokens, self.num_layers = num_virtual_tokens, num_layers
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_submodules = num_transformer_submodules
        self._encoded = {}
        width, row = num_heads * head_dim, 2 * num_heads * head_dim
        if encoder_hidden_size is None:
            prompt_embeddings = nn.Embedding(num_virtual_tokens, num_layers * row).weight.detach()
            self._set_rows(prompt_embeddings.zero_() if init_weights else prompt_embeddings)
            return
        self.embedding = nn.Embedding(num_virtual_tokens, width)
        self.hidden = nn.Linear(width, encoder_hidden_size)
        drawn = nn.Linear(encoder_hidden_size, num_layers * row)
        self.heads = nn.ModuleList()
        for weight, bias in zip(drawn.weight.detach().split(row), drawn.bias.detach().split(row)):
            head = nn.utils.skip_init(nn.Linear, encoder_hidden_size, row, device=weight.device)
            head.weight, head.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            if init_weights:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
            self.heads.append(head)

    @property
    def projected(self) -> bool:
        """Whether an MLP makes the rows."""
        return "heads" in self._modules

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of one layer, [H, V, D] each."""
        layer = layer * self.num_submodules % self.num_layers
        rows = self._project(layer) if self.projected else self.rows[layer]
        return rows.view(-1, 2, self.num_heads, self.head_dim).permute(1, 2, 0, 3).unbind(0)

    def prompt_embeddings(self) -> Tensor:
        """What PEFT stores: [V, L * 2 * H * D], for each layer its keys and then its values. Differentiable."""
        rows = [self._project(layer) for layer in range(self.num_layers)] if self.projected else list(self.rows)
        return torch.cat(rows, 1)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take the rows that PEFT stored, [V, L * 2 * H * D]. An MLP is thrown away. Raises ValueError or TypeError."""
        op, width = "PrefixEncoder.load_prompt_embeddings", self.num_layers * 2 * self.num_heads * self.head_dim
        checks.floating(op, "prompt_embeddings", prompt_embeddings)
        shape = (self.num_virtual_tokens, width)
        checks.shape(op, "prompt_embeddings", prompt_embeddings, shape, "[V, layers * 2 * heads * head_dim]")
        like = next(self.parameters())
        prompt_embeddings = prompt_embeddings.detach().to(like.device, like.dtype)
        if self.projected:
            return self._set_rows(prompt_embeddings, like.requires_grad)
        for row, loaded in zip(self.rows, prompt_embeddings.chunk(self.num_layers, 1)):
            row.data.copy_(loaded)

    def bake(self) -> None:
        """Replace the MLP by the rows that it makes, which train from here on."""
        self.load_prompt_embeddings(self.prompt_embeddings())

    def train(self, mode: bool = True):
        self._encoded = {}
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._encoded = {}
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return self.__dict__ | {"_encoded": {}}  # parameters of a copy count their versions anew

    def _set_rows(self, prompt_embeddings, requires_grad=True):
        for name in ("embedding", "hidden", "heads"):
            self._modules.pop(name, None)
        rows = prompt_embeddings.chunk(self.num_layers, 1)
        self.rows = nn.ParameterList([nn.Parameter(row.clone(), requires_grad) for row in rows])
        self._encoded = {}

    def _project(self, layer):
        """[V, 2 H D]. While generating, rows are kept from one step to the next, as long as no parameter changes."""
        head, hidden = self.heads[layer], self.hidden
        tensors = (self.embedding.weight, hidden.weight, hidden.bias, head.weight, head.bias)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or tensors[0].is_inference():
            return head(torch.tanh(hidden(tensors[0])))
        versions = [tensor._version for tensor in tensors]
        kept = self._encoded.get(layer)
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], tensors)):
            with torch.autocast(tensors[0].device.type, enabled=False):
                kept = self._encoded[layer] = (tensors, versions, head(torch.tanh(hidden(tensors[0]))))
        return kept[2]

    def extra_repr(self) -> str:
        shape = f"num_layers={self.num_layers}, num_heads={self.num_heads}, head_dim={self.head_dim}"
        return f"num_virtual_tokens={self.num_virtual_tokens}, {shape}, projected={self.projected}"
