"""The linear's low-rank update on a GPU: what was tried to make it cheap.

    y = x Wᵀ + s · h Bᵀ   for x (tokens, 4096), h (tokens, 16), B (width, 16), bfloat16

`updates` add to y after the product: a kernel that reads and writes y once, cuBLAS' `addmm_`, and, to hold them against, a
copy of the same bytes. In `alternatives`, `before` computes the update first and adds the product to it in the GEMM, as
qft does; `columns` puts h beside x and B beside the weight, so that one GEMM does both (copying x there is not counted).
`attention` compares torch's kernels, (4, 32, 2048, 128) over 8 heads of keys, forward.

    python benchmarks/low_rank.py --out benchmarks/results/low_rank-h100.json [--sweep]
"""

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dequantize import device_us
from smollm import about
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

TOKENS, RANK, WIDTHS, INPUTS = 8192, 16, (4096, 14336), 4096
SWEPT = {"ROWS": (16, 32, 64, 128), "COLUMNS": (128, 256, 512), "num_warps": (4, 8)}


CONFIG = {"ROWS": 64, "COLUMNS": 256, "num_warps": 8}


def kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def add(y, h, b, scaling, n, width, b_row, b_column, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, RANK)
        left = tl.load(h + row[:, None] * RANK + k[None, :], mask=row[:, None] < n, other=0.0)
        right = tl.load(b + column[None, :] * b_row + k[:, None] * b_column, mask=column[None, :] < width, other=0.0)
        mask = (row[:, None] < n) & (column[None, :] < width)
        where = y + row[:, None].to(tl.int64) * width + column[None, :]
        total = tl.load(where, mask=mask, other=0.0).to(tl.float32) + scaling * tl.dot(left, right)
        tl.store(where, total.to(y.dtype.element_ty), mask=mask)

    # triton finds what a kernel names among its module's globals
    globals()["tl"] = tl
    return add


def add_low_rank(add: Any, y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, config: dict[str, int]) -> None:
    n, width = y.shape
    grid = (-(-n // config["ROWS"]), -(-width // config["COLUMNS"]))
    add[grid](y, h, b, 1e-3, n, width, b.stride(0), b.stride(1), RANK=RANK, **config)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.05


def updates(width: int, sweep: bool) -> dict[str, Any]:
    y, h, other, add = random(TOKENS, width), random(TOKENS, RANK), random(TOKENS, width), kernel()
    # the forward pass has B as (width, rank), the backward pass A as the transpose of (rank, width)
    sides = {"rows": random(width, RANK), "columns": random(RANK, width).T}
    row: dict[str, Any] = {"width": width, "copy_us": device_us([lambda: y.copy_(other)])}
    for side, b in sides.items():
        row[f"kernel_{side}_us"] = device_us([partial(add_low_rank, add, y, h, b, CONFIG)])
        row[f"addmm_{side}_us"] = device_us([partial(y.addmm_, h, b.T, alpha=1e-3)])
    if sweep:
        row["sweep"] = []
        for values in itertools.product(*SWEPT.values()):
            config = dict(zip(SWEPT, values, strict=True))
            us = [device_us([partial(add_low_rank, add, y, h, b, config)]) for b in sides.values()]
            row["sweep"].append({**config, **dict(zip(sides, us, strict=True))})
        row["sweep"].sort(key=lambda r: sum(r[s] for s in sides))
    return row


def alternatives(width: int) -> dict[str, Any]:
    x, w, h, b, y = (
        random(TOKENS, INPUTS),
        random(width, INPUTS),
        random(TOKENS, RANK),
        random(width, RANK),
        random(TOKENS, width),
    )
    wide_x, wide_w = random(TOKENS, INPUTS + RANK), random(width, INPUTS + RANK)
    return {
        "width": width,
        "product_us": device_us([lambda: linear(x, w)]),
        "columns_us": device_us([lambda: linear(wide_x, wide_w)]),
        "before_update_us": device_us([lambda: torch.mm(h, b.T, out=y)]),
        "before_product_us": device_us([lambda: y.addmm_(x, w.T)]),
    }


def attention() -> dict[str, float]:
    q, k, v = random(4, 32, 2048, 128), random(4, 8, 2048, 128), random(4, 8, 2048, 128)
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            call = [lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]
            found[f"{backend.name.lower()}_us"] = device_us(call)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--sweep", action="store_true", help="try block sizes of the kernel")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/low_rank.py needs a CUDA device")
    result = {**about(), "tokens": TOKENS, "rank": RANK, "config": CONFIG}
    result["updates"] = [updates(width, options.sweep) for width in WIDTHS]
    result["alternatives"] = [alternatives(width) for width in WIDTHS]
    result["attention"] = attention()
    text = json.dumps(result, indent=1)
    print(text if not options.sweep else json.dumps([r["sweep"][:6] for r in result["updates"]], indent=1))
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
