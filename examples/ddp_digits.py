"""Digits with DistributedDataParallel, under torchrun --nproc-per-node 6."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
torch.manual_seed(0)
rank, workers = dist.get_rank(), dist.get_world_size()

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))

model = DistributedDataParallel(net)
batches = BatchSampler(DistributedSampler(data, seed=0), 15, drop_last=True)
loader = DataLoader(data, batch_sampler=batches)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for _ in range(5):
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

if rank == 0:
    model.eval()
    right = (net(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()
    print(f"{workers} ranks, accuracy on the training set: {right:.3f}")
dist.barrier()  # gloo: nobody leaves while another rank still talks
dist.destroy_process_group()
