"""One of two processes that train adapters together; the first also trains them alone, on the whole batch.

python distributed_worker.py DIRECTORY RANK: writes rank<RANK>.pt, and whole.pt, into the directory.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyfastpeft import BitFitConfig, IA3Config, LoraConfig, adapt, set_adapter

STEPS = 3


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 5))
    adapt(model, LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=9, init_lora_weights=False), "lora")
    adapt(model, IA3Config(target_modules=["2"], init_ia3_weights=False), "ia3")
    adapt(model, BitFitConfig(target_modules=["3", "4"]), "biases")
    adapt(model, LoraConfig(target_modules=["0"]), "idle")
    set_adapter(model, "lora", "ia3", "biases")
    return model


def train(model: nn.Module, run, x: torch.Tensor, y: torch.Tensor) -> list[dict]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    found = []
    for _ in range(STEPS):
        loss = F.mse_loss(run(x), y)
        optimizer.zero_grad()
        loss.backward()
        gradients = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "gradients": gradients})
        optimizer.step()
    return found


def main(directory: Path, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=2)
    model = adapted()
    x, y = torch.randn(8, 16), torch.randn(8, 5)
    half = slice(4 * rank, 4 * rank + 4)
    torch.save(train(model, DistributedDataParallel(model), x[half], y[half]), directory / f"rank{rank}.pt")
    if rank == 0:
        alone = adapted()
        torch.save(train(alone, alone, x, y), directory / "whole.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
