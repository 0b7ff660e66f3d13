"""Fitting the experts: `fit_experts` with the paper's preset against a plain version."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.measuring import Aim, OnGpu, Ratio, Row, Section, Settings, compare, gpu_rows, peak_on_gpu
from fsteer_lens import fit_experts

LEFT = """
What is left in `fit_experts` is, by a profile, about half the training, whose hidden layer of β costs n·d² an epoch on
both sides, and for the rest K-means and principal directions, which both sides leave to the same libraries. Routing is
the part that is cheaper here: W_Qᵀ W_K C is made before any query is multiplied.
""".strip()


def run(settings: Settings) -> Section:
    """Time and validation error against the plain version."""
    n, d_model = (60, 16) if settings.quick else (1000, 768)
    h, delta = example(n, d_model, settings.device)
    ours = fit_experts(h, delta, preset="paper").report
    assert ours is not None and ours.valid_loss is not None
    plain = plain_fit(h, delta)
    ratio = compare(
        lambda: plain_fit(h, delta),
        lambda: fit_experts(h, delta, preset="paper"),
        rounds=settings.rounds_or(3),
        warmup=0,
    )
    note = f"Epochs {plain.epochs} → {ours.epochs}, K = {plain.n_experts}."
    error = Ratio((ours.valid_loss / plain.valid_loss,), plain.valid_loss, ours.valid_loss, unit="")
    rows = [
        Row("time", "fit_experts / plain version", ratio, Aim(0.7), note),
        Row("validation error", "the same, mean squared error on the same rows", error, Aim(1.001)),
        *gpu_rows("time", "fit_experts / plain version, n = 4,000", Aim(0.7), settings, on_gpu),
    ]
    text = f"""
{n} queries and shifts of width {d_model} in 6 planted clusters. The plain version is the published recipe written with
scikit-learn and PyTorch modules: PCA to 256 dimensions, K-means with 10 restarts for each K in 4..10, the
Calinski-Harabasz index, prototypes, 10 principal directions, AdamW on the full batch for up to 100 epochs with patience
8 and gradients clipped at 1. Both train on the same rows from the same initial weights.
One thread for both; `OMP_NUM_THREADS=4 python -m benchmarks fitting` tells how more of them for K-means change it.
""".strip()
    return Section("Fitting the experts", text, tuple(rows), LEFT)


def on_gpu(shape: str, n: int = 4000, rounds: int = 3) -> OnGpu:
    """Fit on the CUDA device at a model's width, beside the plain version; clustering runs on the CPU in both."""
    h, delta = example(n, shapes.SHAPES[shape]["hidden_size"], "cuda")
    peak = peak_on_gpu(lambda: fit_experts(h, delta, preset="paper"))
    ratio = compare(lambda: plain_fit(h, delta), lambda: fit_experts(h, delta, preset="paper"), rounds=rounds, warmup=0)
    return OnGpu(ratio, peak)


def example(n: int, d_model: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Queries, and shifts that belong to 6 planted clusters and depend on the queries."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cluster = torch.randint(6, (n,), generator=generator)
    centres = rand(6, d_model)
    h = rand(6, d_model)[cluster] + 0.5 * rand(n, d_model)
    delta = centres[cluster] + 0.3 * h @ rand(d_model, d_model) / d_model**0.5
    return h.to(device), delta.to(device)


class Plain(NamedTuple):
    """What the plain version came to."""

    valid_loss: float
    epochs: int
    n_experts: int


class _Controller(nn.Module):
    def __init__(self, d_model: int, m: int) -> None:
        super().__init__()
        self.query, self.key, self.hidden = (nn.Linear(d_model, d_model) for _ in range(3))
        self.output = nn.Linear(d_model, m)

    def forward(self, h: Tensor, prototypes: Tensor, basis: Tensor) -> Tensor:
        scores = self.query(h) @ self.key(prototypes).T / h.shape[1] ** 0.5
        return scores.softmax(dim=1) @ prototypes + self.output(self.hidden(h).relu()) @ basis


def plain_fit(h: Float[Tensor, "n d"], delta: Float[Tensor, "n d"], seed: int = 0) -> Plain:
    """The published recipe, straight from the paper and with the libraries' own parts."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import calinski_harabasz_score

    n, d_model = h.shape
    unit = (delta / delta.norm(dim=1, keepdim=True)).cpu().numpy()
    points = PCA(min(256, n - 1, d_model), svd_solver="full").fit_transform(unit)
    best, labels = -1.0, None
    for count in range(4, 11):
        found = KMeans(count, n_init=10, random_state=seed).fit_predict(points)  # pyright: ignore[reportArgumentType]
        if (score := calinski_harabasz_score(points, found)) > best:
            best, labels = score, found
    assert labels is not None
    k = int(labels.max()) + 1
    prototypes = torch.stack([torch.from_numpy(unit[labels == one].mean(axis=0)) for one in range(k)]).to(h)
    m = min(10, n - 1, d_model)
    basis = torch.from_numpy(PCA(m, svd_solver="full").fit(delta.cpu().numpy()).components_).to(h)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        controller = _Controller(d_model, m).to(h)
        order = torch.randperm(n)
    valid, train = order[: round(0.1 * n)], order[round(0.1 * n) :]
    optimizer = torch.optim.AdamW(controller.parameters(), lr=5e-4, weight_decay=1e-5)
    least, best_epoch = float("inf"), 0
    for epoch in range(1, 101):
        optimizer.zero_grad()
        loss = (controller(h[train], prototypes, basis) - delta[train]).square().sum(dim=1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(controller.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            watched = float((controller(h[valid], prototypes, basis) - delta[valid]).square().sum(dim=1).mean())
        if watched < least:
            least, best_epoch = watched, epoch
        elif epoch - best_epoch >= 8:
            break
    return Plain(least, best_epoch, k)
