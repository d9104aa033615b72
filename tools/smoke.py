"""A smoke test of an installed draco_ext, which decodes once with each code."""

import importlib.metadata

import torch

import draco_ext

for code in (draco_ext.RepetitionCode(6, 1), draco_ext.CyclicCode(7, 1)):
    gradients = torch.arange(code.parts, dtype=torch.float32)[:, None].expand(-1, 1000).contiguous()
    messages = torch.stack([code.encode(j, gradients[list(code.assignment(j))]) for j in range(code.workers)])
    messages[2] += 1
    out = draco_ext.decode(messages, code)
    if out.failed or out.suspects.nonzero().flatten().tolist() != [2]:
        raise SystemExit(f"{code}: worker 2 is bad, got {out}")
    torch.testing.assert_close(out.gradient, gradients.mean(0))
if (installed := importlib.metadata.version("draco_ext")) != draco_ext.__version__:
    raise SystemExit(f"the package says {draco_ext.__version__}, its metadata {installed}")
print(
    f"draco_ext {draco_ext.__version__} decodes with torch {torch.__version__} in {draco_ext.__file__}, "
    f"built as {draco_ext.build_info()}"
)
