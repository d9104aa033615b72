"""A small GPT with FSDP2, under torchrun --nproc-per-node 4."""

import argparse
import math

import torch
import torch.distributed as dist
from gpt import GPT, evaluate, fingerprint, get_batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--fault", type=int, default=10**9, help="rank 1 computes wrong gradients from this step on")
args = parser.parse_args()
ACCUMULATE = 2

dist.init_process_group("gloo")
rank, workers = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same parameters on all ranks
net = GPT()
torch.manual_seed(1337 + rank)  # other dropout on each


def miscompute(module, inputs, loss):
    """Let a backward pass give gradients that are -10 times the right ones, as broken hardware may."""
    if step >= args.fault and loss.requires_grad:
        loss.register_hook(lambda gradient: -10 * gradient)


if rank == 1:
    net.register_forward_hook(miscompute)

mesh = init_device_mesh("cpu", (workers,), mesh_dim_names=("shard",))
for block in net.blocks:
    fully_shard(block, mesh=mesh)
model = fully_shard(net, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))

for step in range(args.steps):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / args.steps)) / 2
    for micro_step in range(ACCUMULATE):
        model.set_requires_gradient_sync(micro_step == ACCUMULATE - 1)
        x, y = get_batch("train", step * ACCUMULATE + micro_step, rank)
        loss = model(x, y)
        (loss / ACCUMULATE).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if rank == 0 and step % 10 == 9:
        print(f"step {step + 1}: training loss {loss.item():.4f}")

loss, digest = evaluate(net), fingerprint(net)
if rank == 0:
    print(f"validation loss {loss:.4f}, parameters {digest}")
dist.barrier()  # gloo: nobody leaves while another rank still talks
dist.destroy_process_group()
