"""Entropic optimal transport from samples to frontier points, for all prompts at once (PG-OT, Eqs. 5 and 6)."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import threshold

CHUNK = 10  # sweeps between two looks at the error
MEMORY = 6  # differences of sweeps that an extrapolation combines
COLD = 100.0  # largest cost over eps that needs no annealing
ANNEALED = 1e-2  # marginal error at which annealing goes on to half the eps
MIN_EPS = 1e-12  # for costs of zero, whose plan is a b'
NEVER = -1e30  # log of the kernel where a weight is 0; finite, so that no difference of infinities arises


def sinkhorn(
    cost: Float[Tensor, "*p n m"],
    a: Float[Tensor, "*p n"] | Bool[Tensor, "*p n"] | None = None,
    b: Float[Tensor, "*p m"] | Bool[Tensor, "*p m"] | None = None,
    reg: float = 0.05,
    *,
    tol: float = 1e-6,
    max_iter: int = 10_000,
    unroll: bool = False,
) -> Float[Tensor, "*p n m"]:
    """The plan of least transport cost less eps times its entropy (PG-OT, Eqs. 5 and 6), for each prompt.

    argmin of sum(plan * cost) - eps H(plan) over plans >= 0 with row sums a and column sums b, where eps is reg times
    the prompt's mean |cost|. It goes to the plan of least cost as reg goes to 0, and to a b' as reg grows.

    Sweeps are matrix products with a kernel that has the potentials absorbed, so nothing under- or overflows. Every
    ten sweeps the potentials are extrapolated (Anderson's mixing); an extrapolation that lowers the dual value is taken
    back. Costs O(P n m) a sweep and three matrices of memory; 30 to 60 sweeps at reg 0.05, hundreds at 0.01, thousands
    at 0.001, and more where a few costs are far larger than the others.

    Args:
        cost: (n, m) or (P, n, m), from each of n samples to each of m targets. Read only where both weights are
            positive, and finite there: padding may hold anything.
        a: weights of the rows, (n,) or (P, n), that sum to 1 a prompt; or booleans, for uniform weights on the rows
            that are True; None: uniform on all. A row of weight 0 gets no mass. A prompt whose rows, or columns, all
            weigh 0 has a plan of zeros.
        b: weights of the columns, likewise.
        reg: entropic strength, relative to the mean |cost| over the pairs of positive weight.
        tol: stop when the marginal error of each prompt, |row sums - a|_1, is smaller; column sums are exact to
            rounding.
        max_iter: most sweeps, besides those of annealing; a sweep updates the potentials of rows and columns once.
        unroll: keep the graph of all sweeps, so that the plan has a gradient with respect to `cost` (eps has none).
            These are plain sweeps in the log domain from zero: slow, and memory grows with their number.

    Returns:
        The plan, of cost's shape and type (float32 for half precision); without a graph unless `unroll`. It is
        computed in float64, where the device has it: float32 sums miss 1e-6 in hard cases, and take more sweeps.

    Raises:
        ValueError: if a shape or a setting is wrong, a cost is not finite, or weights are negative or do not sum to 1.

    Warns:
        UserWarning: if `tol` was not reached; it names the error that is left.
    """
    _check(cost, reg, tol, max_iter)
    dtype = torch.promote_types(cost.dtype, torch.float32)
    c = cost.to(dtype if cost.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64
    c = c if c.ndim == 3 else c[None]
    a = _weights("a", a, c, cost.shape[:-1])
    b = _weights("b", b, c, (*cost.shape[:-2], cost.shape[-1]))
    if not c.numel():
        return torch.zeros_like(cost, dtype=dtype)
    empty = ((a.sum(2) == 0) | (b.sum(2) == 0))[..., None]  # these prompts are solved with any weights, for no mass
    a, b = torch.where(empty, 1 / a.shape[2], a), torch.where(empty, 1 / b.shape[2], b)
    with torch.set_grad_enabled(unroll and torch.is_grad_enabled()):
        log_k = _log_kernel(c, (a > 0).mT & (b > 0), empty, reg)
        plan, error = (_unrolled if unroll else _annealed)(log_k, a, b, tol, max_iter)
        plan = torch.where(empty, 0.0, plan) if bool(empty.any()) else plan
    _warn(error[~empty.flatten()], tol, max_iter)
    return plan.reshape(cost.shape).to(dtype)


def _log_kernel(c: Tensor, valid: Tensor, empty: Tensor, reg: float) -> Tensor:
    """-cost / eps; NEVER where a weight is 0, and 0 for empty prompts."""
    padded = not bool(valid.all())
    if padded or bool(empty.any()):
        c = torch.where(valid & ~empty, c, 0.0)
    with torch.no_grad():
        eps = (reg * c.abs().sum((1, 2)) / valid.sum((1, 2))).clamp_min(MIN_EPS)[:, None, None]
        if not bool(eps.isfinite().all()):
            raise ValueError("sinkhorn: a cost is NaN or infinite where both weights are positive; mask it first.")
    return torch.where(valid, c * (-1 / eps), NEVER) if padded else c * (-1 / eps)


def _annealed(log_k: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Plan and error of the kernel exp(log_k), reached from kernels of twice, four times, ... the eps."""
    largest = -float(log_k.masked_fill(log_k <= NEVER, 0.0).min())
    g = torch.zeros_like(b)
    for k in range(math.ceil(math.log2(max(largest / COLD, 1.0))), 0, -1):
        wide = torch.where(log_k > NEVER, log_k / 2**k, NEVER)
        _, g, _ = _solve(wide, a, b, *_hard_sweep(wide, a, b, g), ANNEALED, 10 * CHUNK)
        g = 2 * g  # potentials are in units of eps
    plan, _, error = _solve(log_k, a, b, *_hard_sweep(log_k, a, b, g), tol, max_iter)
    return plan, error


def _solve(
    log_k: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan = diag(u) exp(f + log_k + g) diag(v), its column potentials g + log v, and its error.

    f and g are absorbed in the kernel and replaced when u or v leaves the range where products are exact.
    """
    number = torch.finfo(log_k.dtype)
    limit = math.log(number.max) / 8  # of |log u| and |log v|
    kernel, log_u, log_v = _absorbed(log_k, a, b, f, g)
    start, guess, best = log_v, torch.zeros_like(a[..., :1], dtype=torch.bool), torch.full_like(a[:, 0, 0], math.inf)
    for sweeps in range(CHUNK, max_iter + CHUNK, CHUNK):
        u, v, trail = _sweeps(kernel, a, b, start, min(CHUNK, max_iter + CHUNK - sweeps))
        error = (u * torch.bmm(v, kernel[1]) - a).abs().sum((1, 2))
        new_u, new_v = _log(u, a), _log(v, b)
        # The dual value of potentials with exact column sums is a.f + b.g; plain sweeps never lower it.
        gain = (a * (new_u - log_u)).sum(2, keepdim=True) + (b * (new_v - log_v)).sum(2, keepdim=True)
        finite = gain.isfinite() & error.isfinite()[:, None, None]
        good = finite & (~guess | (gain > -8 * number.eps))
        log_u, log_v = torch.where(good, new_u, log_u), torch.where(good, new_v, log_v)
        best = torch.where(good.flatten(), error, best)
        left = int((best >= tol).sum())
        if sweeps >= max_iter or 2 * left <= len(a):
            break
        step = _extrapolation(trail, b)
        guess = good & (step.abs().amax(2, keepdim=True) < limit)
        start = torch.where(guess, log_v + step, log_v)
        broken = not bool(finite.all())
        if broken or float(torch.maximum(log_u.abs().max(), log_v.abs().max())) > limit:
            f, g, start = f + log_u, g + log_v, start - log_v
            if broken:
                f, g = _log_sweeps(log_k, a, b, g)
                start, guess = torch.zeros_like(b), torch.zeros_like(guess)
            kernel, log_u, log_v = _absorbed(log_k, a, b, f, g)
    u = torch.where(good, u, _exp(log_u, a))
    v = b / torch.bmm(u, kernel[0])
    plan, f, g = u.mT * kernel[0] * v, f + log_u, g + _log(v, b)
    error = (u * torch.bmm(v, kernel[1]) - a).abs().sum((1, 2))
    if left > 0 and sweeps < max_iter:  # half of the prompts are done: go on without them
        rest = (best >= tol).nonzero()[:, 0]
        found = _solve(log_k[rest], a[rest], b[rest], f[rest], g[rest], tol, max_iter - sweeps)
        plan[rest], g[rest], error[rest] = found
    return plan, g, error


def _absorbed(
    log_k: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """exp(f + log_k + g) with its transpose, and the scalings' logarithms, which are 0 again.

    The kernel is 1 where a weight is 0, so that no row or column sums to 0; u or v is 0 there.
    """
    kernel = (log_k + f.mT).add_(g)
    if bool((kernel < NEVER / 2).any()):
        kernel = torch.where(kernel < NEVER / 2, 0.0, kernel)
    kernel = threshold(kernel.exp_(), 1e8 * torch.finfo(kernel.dtype).tiny, 0.0)  # denormal numbers are slow
    return (kernel, kernel.mT.contiguous()), torch.zeros_like(a), torch.zeros_like(b)


def _sweeps(
    kernel: tuple[Tensor, Tensor], a: Tensor, b: Tensor, log_v: Tensor, num: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scalings after `num` sweeps from log_v, and the last columns' scalings on the way."""
    v, trail = _exp(log_v, b), []
    for _ in range(num):
        u = a / torch.bmm(v, kernel[1])
        v = b / torch.bmm(u, kernel[0])
        trail.append(v)
    return u, v, trail[-MEMORY - 1 :]


def _log_sweeps(log_k: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Potentials after CHUNK sweeps in the log domain: slower, exact at any range, and with a graph if log_k has one.

    f = log a - LSE_j(log_k + g), g = log b - LSE_i(log_k + f)
    """
    for _ in range(CHUNK):
        f = _log(a, a) - torch.where(a > 0, torch.logsumexp(log_k + g, 2)[:, None], 0.0)
        g = _log(b, b) - torch.where(b > 0, torch.logsumexp(log_k + f.mT, 1)[:, None], 0.0)
    return f, g


def _hard_sweep(log_k: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The sweep of eps = 0, for a kernel whose largest entry is 1 in each row and column."""
    f = torch.where(a > 0, -(log_k + g).amax(2)[:, None], 0.0)
    return f, torch.where(b > 0, -(log_k + f.mT).amax(1)[:, None], 0.0)


def _extrapolation(trail: list[Tensor], b: Tensor) -> Tensor:
    """Step from the last log v to where the sweeps seem to lead: Anderson's mixing, type II, of their differences."""
    log_v = _log(torch.cat(trail, 1), b).mT  # (P, m, MEMORY + 1)
    d = log_v.diff(dim=2)
    dd = d.diff(dim=2)
    gram = dd.mT @ dd
    scale = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(torch.finfo(d.dtype).tiny)
    ridge = 1e-10 if d.dtype == torch.float64 else 1e-6
    factor, _ = torch.linalg.cholesky_ex(
        gram / scale + ridge * torch.eye(gram.shape[1], dtype=d.dtype, device=d.device)
    )
    return -(d[..., 1:] @ torch.cholesky_solve(dd.mT @ d[..., -1:] / scale, factor)).mT


def _unrolled(log_k: Tensor, a: Tensor, b: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Plan and error by plain sweeps from zero, with the graph of all of them."""
    g = torch.zeros_like(b)
    for _ in range(0, max_iter, CHUNK):
        f, g = _log_sweeps(log_k, a, b, g)
        plan = torch.where(log_k > NEVER, (f.mT + log_k + g).exp(), 0.0)
        error = (plan.detach().sum(2) - a[:, 0]).abs().sum(1)
        if bool(error.max() < tol):
            break
    return plan, error


def _log(x: Tensor, weight: Tensor) -> Tensor:
    """log x, and 0 where the weight is 0."""
    return torch.where(weight > 0, x, 1.0).log()


def _exp(x: Tensor, weight: Tensor) -> Tensor:
    """exp x, and 0 where the weight is 0."""
    return torch.where(weight > 0, x.exp(), 0.0)


def _weights(name: str, w: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Weights (P, 1, k) of the dtype and device of `like`, that sum to 1, or to 0 for a prompt without any."""
    if w is None:
        w = torch.ones(shape, dtype=torch.bool, device=like.device)
    if w.shape != shape:
        raise ValueError(f"sinkhorn: with this cost {name} has the shape {tuple(shape)}; got {tuple(w.shape)}.")
    uniform = w.dtype == torch.bool
    w = w.detach().to(like).unsqueeze(-2)
    w = w if w.ndim == 3 else w[None]
    total = w.sum(2, keepdim=True)
    if not uniform and not bool(((w >= 0).all(2, keepdim=True) & ((total == 0) | ((total - 1).abs() < 1e-2))).all()):
        raise ValueError(
            f"sinkhorn: weights are not negative and sum to 1 a prompt (0 for one without samples or targets); "
            f"{name} has a least weight of {float(w.min()):.3g} and sums from {float(total.min()):.3g} to "
            f"{float(total.max()):.3g}."
        )
    return w / torch.where(total > 0, total, 1.0)  # also what half precision has rounded


def _check(cost: Tensor, reg: float, tol: float, max_iter: int) -> None:
    if cost.ndim not in (2, 3):
        raise ValueError(f"sinkhorn: cost is (n, m), or (P, n, m) for P prompts; got {tuple(cost.shape)}.")
    if not (math.isfinite(reg) and reg > 0):
        raise ValueError(f"sinkhorn: reg is a share of the mean cost, finite and > 0; got {reg}.")
    if not tol > 0 or max_iter < 1:
        raise ValueError(f"sinkhorn: tol > 0 and max_iter >= 1; got tol={tol} and max_iter={max_iter}.")


def _warn(error: Tensor, tol: float, max_iter: int) -> None:
    left = error[~(error < tol)]
    if len(left):
        warnings.warn(
            f"sinkhorn: after {max_iter} sweeps the marginals of {len(left)} of {len(error)} prompts are off by up to "
            f"{float(left.max()):.2g} (L1), and tol is {tol:g}; raise reg or max_iter.",
            stacklevel=3,
        )
