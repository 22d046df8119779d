"""Weights as sums of codebook vectors, fitted to what a layer computes (additive quantization, AQLM).

A group of weights, `out_group_size` rows by `in_group_size` columns, is `scale * Σ_m codebooks[m, code_m]`. Codes,
codebooks and scales are to keep tr((W − Ŵ) H (W − Ŵ)ᵀ) small, H being the second moment of what the layer reads:
residual k-means for a start (arXiv 2401.06118, section 3), then rounds of two steps.

- Codes: with H = U Uᵀ, U upper triangular, the error of a row is Σ_j ‖(w − ŵ) U_j‖², and its j-th term depends on the
  first j groups alone. A beam search over the groups, the most active ones first, therefore knows what its choices so far
  cost, and each choice makes good what those before it broke, as in GPTQ (2210.17323).
- Codebooks, by preconditioned conjugate gradients over the normal equations, and scales, in closed form.

Every step lowers the error or leaves it. Nothing waits for the device, but for one look at whether H has a factor; sums
are taken in one order, so that the same weight gives the same bits on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qft.errors import BadOption

BLOCK = 16
"""Groups that are encoded before the columns behind them hear of it."""

SAMPLES = 64
"""Vectors a centroid that k-means looks at, at most."""

CONVERGED = 1e-9
"""Of the squared, preconditioned gradient that conjugate gradients started from."""

LEAST = 2.0**-20
"""Weight of a row in the fit of the codebooks at least, as a share of the largest row's."""

ROOM = 2**26
"""Distances that are held at a time."""


@dataclass
class Additive:
    """A weight of (G · out_group_size) × (J · in_group_size) in M codebooks of K vectors.

    Attributes:
        codes: int64 (G, J, M), below K.
        codebooks: float32 (M, K, out_group_size, in_group_size).
        scales: float32 (G,).
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sums of codebook vectors, scales left out: float32 (out_features, in_features), from the first codebook on.

    Args:
        codes: any integers below K, (G, J, M).
        codebooks: float (M, K, out_group_size, in_group_size).
    """
    (rows, groups, count), (_, _, high, wide) = codes.shape, codebooks.shape
    books, codes = codebooks.float().flatten(2), codes.reshape(-1, count)
    value = books[0].index_select(0, codes[:, 0])
    for m in range(1, count):
        value += books[m].index_select(0, codes[:, m])
    if high > 1:
        value = value.view(rows, groups, high, wide).transpose(1, 2)
    return value.reshape(rows * high, groups * wide)


def fit(
    weight: Tensor,
    second_moment: Tensor | None = None,
    *,
    num_codebooks: int,
    codebook_size: int,
    in_group_size: int,
    out_group_size: int = 1,
    rounds: int = 3,
    beam: int = 4,
    damp: float = 0.01,
    steps: int = 10,
    seed: int = 0,
) -> Additive:
    """Codes, codebooks and scales of a weight.

    Args:
        weight: float (out_features, in_features), which the group sizes divide.
        second_moment: E[x xᵀ], float32 (in_features, in_features); None for the identity.
        rounds: of codes and codebooks after the start.
        beam: codings of a row that are kept from group to group, and vectors tried of every codebook but the last.
        damp: added to the second moment's diagonal, as a share of its mean.
        steps: of conjugate gradients a round.
        seed: of the vectors that k-means starts from.

    Raises:
        BadOption: the second moment is not finite.
    """
    rows, columns = weight.shape
    high, wide = out_group_size, in_group_size
    weight = weight.float()
    parts = weight.view(rows // high, -1)
    peak = parts.abs().amax(1)  # taken out first: squares of tiny values are not floats
    empty = peak == 0
    scales = peak * (parts / peak.masked_fill(empty, 1.0)[:, None]).square().mean(1).sqrt()
    scales = scales.masked_fill(empty, 1e-20)
    order = factor = moment = None
    if second_moment is not None:
        order, moment, factor = _metric(second_moment.to(weight.device, torch.float32), wide, damp)
        weight = weight[:, order]
    problem = _Problem(weight, moment, factor, high, wide)
    importance = weight.new_ones(columns) if moment is None else moment.diagonal()
    books = _kmeans(problem.scaled(scales), importance, num_codebooks, codebook_size, high, wide, seed)
    codes = None
    for _ in range(rounds):
        scaled = problem.scaled(scales)
        found, reached = problem.encode(scaled, books, beam)
        if codes is not None:
            before = problem.cost(scaled - decode(codes, books))
            better = reached < before
            found = torch.where(better[:, None, None], found, codes)
        codes = found
        index = _Index(codes, codebook_size)
        books = problem.books(codes, index, books, scales, steps)
        scales = problem.scales(decode(codes, books), scales)
    if order is not None:
        back = torch.argsort(order.view(-1, wide)[:, 0])
        codes = codes[:, back]
    return Additive(codes, books, scales.masked_fill(empty, 0))


def _metric(moment: Tensor, wide: int, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """Columns in the order in which they are encoded, H in that order and damped, and U of H = U Uᵀ."""
    activity = moment.diagonal().view(-1, wide).sum(1)
    groups = torch.argsort(activity, descending=True, stable=True)
    order = (groups[:, None] * wide + torch.arange(wide, device=moment.device)).view(-1)
    moment = moment[order][:, order]
    mean = moment.diagonal().mean()
    while damp <= 1:
        damped = moment.clone()
        damped.diagonal().add_(torch.where(mean > 0, damp * mean, 1.0))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return order, damped, lower.flip(0, 1).contiguous()
        damp = max(damp * 10, 1e-3) if damp < 0.1 else damp + 0.3
    raise BadOption("the calibration data's second moments have no Cholesky factor: they hold NaN or infinity")


class _Index:
    """Which groups use a codebook vector: sums over them, in one order on every run."""

    def __init__(self, codes: Tensor, size: int):
        count = codes.shape[-1]
        flat = (codes.reshape(-1, count) + torch.arange(count, device=codes.device) * size).view(-1)
        ordered, which = torch.sort(flat, stable=True)
        self.group = which // count
        self.start = torch.searchsorted(ordered, torch.arange(count * size, device=codes.device))

    def sums(self, vectors: Tensor) -> Tensor:
        """(groups, n) → (M · K, n)."""
        return torch.nn.functional.embedding_bag(self.group, vectors, self.start, mode="sum")


@dataclass
class _Problem:
    """A weight float32 (out, in) to encode, H (in, in) and its factor, or None for the identity; columns are in order."""

    weight: Tensor
    moment: Tensor | None
    factor: Tensor | None
    high: int
    wide: int

    def scaled(self, scales: Tensor) -> Tensor:
        return (self.weight.view(len(scales), -1) / scales[:, None]).view_as(self.weight)

    def through(self, value: Tensor) -> Tensor:
        return value if self.moment is None else value @ self.moment

    def cost(self, error: Tensor) -> Tensor:
        """tr(E H Eᵀ) of each group of rows, (G,)."""
        seen = error if self.factor is None else error @ self.factor
        return seen.square().view(len(error) // self.high, -1).sum(1)

    def vectors(self, value: Tensor) -> Tensor:
        """(out, in) → (G, J, high · wide)."""
        rows, columns = value.shape
        parts = value.view(rows // self.high, self.high, columns // self.wide, self.wide)
        return parts.transpose(1, 2).reshape(rows // self.high, columns // self.wide, -1)

    # ---- codes -------------------------------------------------------------------------------------------

    def encode(self, scaled: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        """Codes (G, J, M) of the weight over its scales, and what they cost, (G,)."""
        rows = len(scaled) // self.high
        tries = beam * beam if len(books) > 1 else beam
        per_row = tries * books.shape[1] * (1 if self.factor is not None else scaled.shape[1] // self.wide)
        chunk = max(1, ROOM // per_row)
        search = self._alone if self.factor is None else self._in_order
        parts = [search(scaled[i * self.high : (i + chunk) * self.high], books, beam) for i in range(0, rows, chunk)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _alone(self, scaled: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        vectors = self.vectors(scaled)
        rows, groups, size = vectors.shape
        target = vectors.view(rows * groups, 1, size)
        _, codes, cost = _choose(target, target.new_zeros(len(target), 1), books.flatten(2), beam, 1)
        return codes.view(rows, groups, -1), cost.view(rows, groups).sum(1)

    def _in_order(self, scaled: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        high, wide, factor = self.high, self.wide, self.factor
        rows, columns, count = len(scaled) // high, scaled.shape[1], len(books)
        # what is left of W U beyond the groups that are encoded; one a beam, of which there is one at first
        left = (scaled @ factor).view(rows, 1, high, columns)
        cost = left.new_zeros(rows, 1)
        codes = torch.empty(rows, 1, 0, count, dtype=torch.int64, device=scaled.device)
        for start in range(0, columns, BLOCK * wide):
            end = min(start + BLOCK * wide, columns)
            near, old = left[..., start:end], torch.arange(left.shape[1], device=left.device).expand(rows, -1)
            value = near.new_empty(rows, left.shape[1], high, 0)
            recent = codes[:, :, :0]
            for first in range(0, end - start, wide):
                here = slice(start + first, start + first + wide)
                seen = (books @ factor[here, here]).flatten(2)
                target = near[..., first : first + wide].flatten(2)
                parent, picked, cost = _choose(target, cost, seen, beam, beam)
                near, value, recent, old = (_follow(t, parent) for t in (near, value, recent, old))
                chosen = _sum(picked, books)
                if first + wide < end - start:
                    near[..., first + wide :] -= chosen @ factor[here, start + first + wide : end]
                value = torch.cat([value, chosen], -1)
                recent = torch.cat([recent, picked[:, :, None]], 2)
            codes = torch.cat([_follow(codes, old), recent], 2)
            left = _follow(left, old)
            if end < columns:
                left[..., end:] -= value @ factor[start:end, end:]
        cost, best = cost.min(1, keepdim=True)
        return _follow(codes, best)[:, 0], cost[:, 0]

    # ---- codebooks and scales ----------------------------------------------------------------------------

    def books(self, codes: Tensor, index: _Index, books: Tensor, scales: Tensor, steps: int) -> Tensor:
        """The codebooks that suit these codes better, by conjugate gradients from `books` on."""
        # rows are weighed by their size, which is bounded: a vector that only rows of zeros use keeps a finite step
        power = (scales / scales.amax()).clamp(min=LEAST).square().repeat_interleave(self.high)[:, None]

        def gathered(value: Tensor) -> Tensor:
            return index.sums(self.vectors(value).flatten(0, 1)).view_as(books)

        diagonal = power.expand_as(self.weight) if self.moment is None else power * self.moment.diagonal()
        diagonal = gathered(diagonal)
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        error = self.scaled(scales) - decode(codes, books)
        residual = gathered(power * self.through(error))
        direction = step = inverse * residual
        inner = (residual * step).sum()
        least = (
            inner * CONVERGED
        )  # beyond that, rounding errors would be followed, and codebooks may shift against each other
        for _ in range(steps):
            image = gathered(power * self.through(decode(codes, direction)))
            length = torch.where(inner > least, _ratio(inner, (direction * image).sum()), 0.0)
            books = books + length * direction
            residual = residual - length * image
            step = inverse * residual
            before, inner = inner, (residual * step).sum()
            direction = step + _ratio(inner, before) * direction
        return books

    def scales(self, value: Tensor, scales: Tensor) -> Tensor:
        """The scales that suit the sums `value` (out, in) best."""
        seen = self.through(value)
        above, below = ((t * seen).view(len(scales), -1).sum(1) for t in (self.weight, value))
        return torch.where((below > 0) & (above > 0), above / below, scales)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _sum(codes: Tensor, books: Tensor) -> Tensor:
    """(rows, beam, M) → (rows, beam, high, wide)."""
    return sum(books[m][codes[..., m]] for m in range(len(books)))


def _follow(tensor: Tensor, parent: Tensor) -> Tensor:
    """What of `tensor` (rows, beam, ...) belongs to the beams' parents (rows, new beam)."""
    shape = [*parent.shape, *tensor.shape[2:]]
    index = parent.view(*parent.shape, *[1] * (tensor.ndim - 2)).expand(shape)
    return tensor.gather(1, index)


def _choose(target: Tensor, cost: Tensor, books: Tensor, beam: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of each row's beams by one group.

    Args:
        target: (rows, beams, n), what each beam wants of the group.
        cost: (rows, beams) so far.
        books: (M, K, n).
        beam: vectors tried of each codebook but the last, a beam.
        keep: continuations to keep.

    Returns:
        Each one's beam (rows, keep), codes (rows, keep, M) and cost (rows, keep).
    """
    rows, beams, _ = target.shape
    parent = torch.arange(beams, device=target.device).expand(rows, -1)
    codes = parent.new_empty(rows, beams, 0)
    for m, book in enumerate(books):
        size = len(book)
        # ‖t − c‖² = ‖t‖² + (‖c‖² − 2 t·c)
        distance = torch.addmm(book.square().sum(1), target.flatten(0, 1), book.T, alpha=-2)
        distance = distance.view(rows, beams, size)
        if m + 1 < len(books):
            found, code = distance.topk(min(beam, size), largest=False, sorted=False)
            at = torch.arange(beams, device=code.device)[:, None].expand_as(code).flatten(1)
            code = code.flatten(1)
        else:
            distance += (cost.gather(1, parent) + target.square().sum(-1))[..., None]
            if keep == 1:
                found, code = distance.flatten(1).min(1, keepdim=True)
            else:
                found, code = distance.flatten(1).topk(min(keep, beams * size), largest=False, sorted=False)
            at, code = code // size, code % size
            cost = found
        parent, codes = parent.gather(1, at), _follow(codes, at)
        codes = torch.cat([codes, code[..., None]], -1)
        if m + 1 < len(books):
            target, beams = _follow(target, at) - book[code], at.shape[1]
    return parent, codes, cost


def _kmeans(
    scaled: Tensor, importance: Tensor, count: int, size: int, high: int, wide: int, seed: int, steps: int = 10
) -> Tensor:
    """Codebooks (M, K, high, wide), each of what those before it leave, errors weighed by column (in,)."""
    rows, columns = scaled.shape
    parts = scaled.view(rows // high, high, columns // wide, wide).transpose(1, 2).reshape(-1, high * wide)
    weights = importance.view(-1, wide).repeat(1, high)
    generator = torch.Generator().manual_seed(seed)
    taken = torch.randperm(len(parts), generator=generator)[: max(SAMPLES * size, 2**14)].to(scaled.device)
    x, h = parts[taken], weights[taken % len(weights)]
    h = h / h.mean()
    books = []
    for _ in range(count):
        first = torch.randperm(len(x), generator=generator)[:size].to(x.device)
        book = x.new_zeros(size, x.shape[1])
        book[: len(first)] = x[first]
        for _ in range(steps):
            code = _nearest(x, h, book)
            index = _Index(code[:, None], size)
            below = index.sums(h)
            book = torch.where(below > 0, index.sums(h * x) / below.clamp(min=1e-30), book)
        books.append(book)
        x = x - book[_nearest(x, h, book)]
    return torch.stack(books).view(count, size, high, wide)


def _nearest(x: Tensor, h: Tensor, book: Tensor) -> Tensor:
    """The vector of `book` (K, n) nearest to each of `x` (N, n), by the weights `h` (N, n) of its elements."""
    pairs, table = torch.cat([x * h, h], 1), torch.cat([book * -2, book.square()], 1).T
    chunk = max(1, ROOM // len(book))
    return torch.cat([(pairs[i : i + chunk] @ table).argmin(1) for i in range(0, len(x), chunk)])
