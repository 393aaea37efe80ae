"""A run's files as a watched training leaves them, made up but of the right shape."""

import json
import math

import numpy as np

LAYERS = [
    "embedding",
    *(f"blocks.{i}.{p}" for i in range(5) for p in ("attention", "mlp")),
]
LAYERS.append("head")
EDGES = [-10.0, 14.0, 48]


def write_run(folder, rows=2000, *, resumed=1200, back=40, seed=0, user=True):
    """Rows, samples, spikes and histograms; returns the rows as they were written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(about()))
    made = Maker(seed, rows, user=user)
    files = {n: (folder / f"{n}.jsonl").open("w") for n in ("rows", "samples")}
    files |= {n: (folder / f"{n}.jsonl").open("w") for n in ("spikes", "histograms")}
    written = []
    step = 0
    for number in range(rows):
        if number == resumed:
            step -= back
        row, samples, spike, counts = made.step(step, number)
        written.append(row)
        lines = {"rows": row, "samples": {"step": step, "samples": samples}}
        lines["histograms"] = {
            "step": step,
            "name": "gradient/sample_norms",
            "edges_log2": EDGES,
            "counts": counts,
        }
        if spike:
            lines["spikes"] = spike
        for name, line in lines.items():
            files[name].write(json.dumps(line) + "\n")
        step += 1
    for file in files.values():
        file.close()
    return written


def about():
    counts = [50_000 if n == "embedding" else 20_000 for n in LAYERS]
    layers = [
        {"name": n, "parameters": c, "tensors": [f"{n}.weight", f"{n}.bias"]}
        for n, c in zip(LAYERS, counts, strict=True)
    ]
    return {
        "fastminima": "0.1.0",
        "schema": 1,
        "started": "2026-03-01T12:00:00Z",
        "model": "Transformer",
        "parameters": sum(counts),
        "layers": layers,
        "optimizer": {"name": "SGD", "options": {"lr": 0.05, "momentum": 0.9}},
        "every": 1,
        "sharpness": 20,
        "dataset_size": 50_000,
        "torch": "2.13.0",
        "python": "3.11.2",
        "device": "cpu",
        "machine": "Linux x86_64",
        "threads": 2,
    }


class Maker:
    """Draws a step's numbers; some rows are not finite, some steps are spikes."""

    def __init__(self, seed, rows, *, user):
        self.random = np.random.default_rng(seed)
        self.rows = rows
        self.user = user
        self.noise, self.seen = 340.0, 20.0  # as a running average keeps them
        self.hot = self.random.integers(50_000, size=12)  # samples that come back

    def step(self, step, number):
        r = self.random
        time = step / self.rows
        is_spike = number in (self.rows // 4, self.rows // 2, self.rows * 7 // 8)
        rate = 0.05 if time < 0.6 else 0.01
        batch = 64 if time < 0.4 else 128
        loss = (0.3 + 2.2 * math.exp(-6 * time)) * r.lognormal(0, 0.12)
        loss *= 4 if is_spike else 1
        trace = (40 + 300 * math.exp(-4 * time)) * r.lognormal(0, 0.2)
        true_signal = 0.15 + 20 * math.exp(-8 * time)
        signal = true_signal + r.normal() * trace / batch * 0.5
        self.noise = 0.97 * self.noise + 0.03 * trace
        self.seen = 0.97 * self.seen + 0.03 * true_signal
        scale = self.noise / self.seen
        row = {
            "step": step,
            "loss": loss,
            "gradient/count": batch,
            "gradient/mean_grad_sq_norm": true_signal + trace / batch,
            "gradient/norm_max": math.sqrt(trace) * (9 if is_spike else 3),
            "gradient/norm_median": math.sqrt(trace) * r.lognormal(-0.1, 0.05),
            "gradient/covariance_trace": trace,
            "gradient/signal": signal,
            "gradient/noise_scale": trace / signal,
            "gradient/noise_scale_smoothed": scale,
            "gradient/noise_scale_low": scale * 0.75,
            "gradient/noise_scale_high": None
            if number > 0.92 * self.rows
            else scale * 1.5,
            "factors/learning_rate": rate,
            "factors/momentum": 0.9,
            "factors/weight_decay": 5e-4,
            "factors/batch_size": batch,
            "factors/ratio": rate / 0.1 * (1 / batch - 1 / 50_000),
        }
        if number > 0.92 * self.rows:
            row["gradient/noise_scale_high"] = None
        variance = trace / about()["parameters"]
        row["factors/temperature"] = row["factors/ratio"] * variance / 2
        if number % 20 == 0:
            row |= self.sharpness(time, rate)
        row |= self.layers(trace, true_signal, time, batch)
        if self.user:
            row["accuracy"] = 1 - loss / 4
        if number in (self.rows // 3, self.rows // 3 + 1):
            for name in ("loss", "gradient/signal", "gradient/noise_scale"):
                row[name] = None
        unbounded = "gradient/noise_scale_high"
        found = [v for name, v in row.items() if name != unbounded]
        row["is_finite"] = all(v is not None for v in found)
        samples = self.samples(trace, is_spike)
        spike = None
        if is_spike:
            spike = {
                "step": step,
                "what": "norm",
                "value": row["gradient/norm_max"],
                "usual": 3 * math.sqrt(trace),
                "scale": 0.4,
                "z": 11.5,
                "samples": samples,
            }
        norms = np.log2(np.sqrt(trace) * r.lognormal(-0.5, 0.6, size=batch))
        counts, _ = np.histogram(norms, bins=EDGES[2], range=EDGES[:2])
        return row, samples, spike, counts.tolist()

    def sharpness(self, time, rate):
        edge = 2 * 1.9 / rate
        first = (
            edge * min(1.02, 0.2 + 2.5 * (time % 0.6)) * self.random.lognormal(0, 0.02)
        )
        return {
            "sharpness/eigenvalue_1": first,
            "sharpness/residual_1": first * 0.02,
            "sharpness/eigenvalue_2": first * 0.6,
            "sharpness/residual_2": first * 0.03,
            "sharpness/upper": first * 1.05,
            "sharpness/products": 12,
            "sharpness/converged": True,
            "sharpness/two_over_lr": edge,
        }

    def layers(self, trace, signal, time, batch):
        weights = np.array(
            [1 + 3 * (i == 11) * time + i / 6 for i in range(len(LAYERS))]
        )
        shares = weights / weights.sum() * self.random.lognormal(0, 0.1, len(LAYERS))
        row = {}
        for name, share in zip(LAYERS, (shares / shares.sum()).tolist(), strict=True):
            noise = share * trace
            seen = share * signal + self.random.normal() * noise / batch * 0.4
            row |= {
                f"layers/{name}/sq_norm": noise + share * signal,
                f"layers/{name}/mean_grad_sq_norm": share * signal + noise / batch,
                f"layers/{name}/covariance_trace": noise,
                f"layers/{name}/signal": seen,
                f"layers/{name}/noise_scale": noise / seen,
                f"layers/{name}/share": share,
            }
        return row

    def samples(self, trace, is_spike):
        r = self.random
        norms = sorted(r.lognormal(0.6, 0.3, 4) * math.sqrt(trace), reverse=True)
        if is_spike:
            norms[0] *= 4
        ids = r.integers(50_000, size=4).tolist()
        if r.random() < 0.5:
            ids[0] = int(r.choice(self.hot))
        return [
            {
                "id": f"train/{i:05d}" if i % 2 else i,
                "index": k,
                "rank": 0,
                "microbatch": 0,
                "loss": float(r.lognormal(1, 0.2)),
                "norm": float(norm),
                "share": None,
                "z": 3.1,
                "layers": dict(
                    zip(
                        r.permutation(LAYERS)[:3].tolist(), (0.6, 0.2, 0.1), strict=True
                    )
                ),
            }
            for k, (i, norm) in enumerate(zip(ids, norms, strict=True))
        ]
