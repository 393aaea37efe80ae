"""Models that people train on GPUs: is the probe right there, and what does it cost.

Each is probed in the precision it is trained in and compared with single samples of the
same graph, one `autograd.grad(losses[n])` each. Both round, and GPUs add with atomics,
so in bfloat16 they agree to some 1e-2 of a sample's squared norm.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastminima as fm
from benchmarks import models as ours

__all__ = ["MODELS", "models"]

DEVICE = torch.device("cuda")
_ROUNDS = 7
_SINGLE = 3  # samples that are differentiated one by one
# Of squared norms: bfloat16 has 8 bits, and a gradient's rounding adds up over layers.
_TOLERANCE = {"float32": 1e-3, "autocast": 3e-2, "bfloat16": 6e-2}

Losses = Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """A name, a precision, and what makes the model and its losses."""

    name: str
    precision: str  # float32, autocast or bfloat16
    make: Callable[[], tuple[nn.Module, Losses]]


def models(seconds: float) -> dict:
    """All of them, in order, as far as the time goes."""
    end = time.monotonic() + seconds
    found: dict = {}
    for model in MODELS:
        name = f"{model.name}, {model.precision}"
        if time.monotonic() > end - 15:
            found[name] = {"ok": False, "error": "no time was left"}
            continue
        try:
            found[name] = _look_at(model)
        except Exception as error:  # one that fails must not hide the others
            said = f"{type(error).__name__}: {error}"[:1500]
            found[name] = {"ok": False, "error": said}
        print(name, found[name], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return {"ok": all(m["ok"] for m in found.values()), "models": found}


def _look_at(model: Model) -> dict:
    torch.manual_seed(0)
    network, losses = model.make()
    plain = _step(network, lambda: losses().mean().backward())
    plain()
    plain()
    plain_peak = _peak(plain)
    plain_seconds = _median(plain)
    probe = fm.GradientProbe(network)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        start = time.perf_counter()
        stats = _step(network, lambda: probe.backward(losses()))()
        torch.cuda.synchronize()
        cold = time.perf_counter() - start  # with kernels compiled on the way
    first_probe = fm.GradientProbe(network)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    _step(network, lambda: first_probe.backward(losses()))()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    first_peak = torch.cuda.max_memory_allocated()
    probed = _step(network, lambda: probe.backward(losses()))
    fused_probe = fm.GradientProbe(network, mode="fused")
    fused = _step(network, lambda: fused_probe.backward(losses()))
    fused()
    error = _worst_error(network, losses, fm.GradientProbe(network))
    return {
        "ok": error <= _TOLERANCE[model.precision] and bool(stats.is_finite),
        "worst_error": error,
        "fallbacks": sorted(
            {str(w.message)[:120] for w in said if "No rule" in str(w.message)}
        ),
        "said": sorted({str(w.message)[:120] for w in said})[:8],
        "is_remembered": bool(probe._reader._structures),
        "plain_ms": 1e3 * plain_seconds,
        "cold_seconds": cold,
        "first_over_plain": first / plain_seconds,
        "first_peak_over_plain": first_peak / plain_peak,
        "observe_over_plain": _median(probed) / plain_seconds,
        "fused_over_plain": _median(fused) / plain_seconds,
    }


def _step(network: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    def step() -> object:
        network.zero_grad(set_to_none=True)
        return run()

    return step


def _median(step: Callable[[], object]) -> float:
    step()
    found = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _peak(step: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def _worst_error(network: nn.Module, losses: Losses, probe: fm.GradientProbe) -> float:
    """Of |g_n|^2 over a few samples, relative."""
    of_samples = losses()
    parameters = [p for p in network.parameters() if p.requires_grad]
    want = []
    for n in range(_SINGLE):
        grads = torch.autograd.grad(
            of_samples[n], parameters, retain_graph=True, allow_unused=True
        )
        squares = [g.double().square().sum() for g in grads if g is not None]
        want.append(torch.stack(squares).sum())
        del grads
    network.zero_grad(set_to_none=True)
    stats = probe.backward(of_samples)
    assert stats is not None
    assert stats.sq_norms is not None
    got = stats.sq_norms[:_SINGLE].double()
    return float(((got - torch.stack(want)) / torch.stack(want)).abs().max())


def _autocast(precision: str):
    return torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast")


def _language(make: Callable[[], nn.Module], precision: str, vocabulary: int):
    def build() -> tuple[nn.Module, Losses]:
        network = make().to(DEVICE)
        if precision == "bfloat16":
            network = network.bfloat16()
        ids = torch.randint(vocabulary, (8, 1024), device=DEVICE)

        def losses() -> Tensor:
            with _autocast(precision):
                logits = network(ids).logits[:, :-1]
            tokens = F.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            return tokens.view(len(ids), -1).mean(1)

        return network, losses

    return build


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def _images(
    make: Callable[[], nn.Module],
    precision: str,
    batch: int,
    size: int,
    classes: int,
    *,
    channels_last: bool = False,
):
    def build() -> tuple[nn.Module, Losses]:
        network = make().to(DEVICE)
        x = torch.randn(batch, 3, size, size, device=DEVICE)
        y = torch.randint(classes, (batch,), device=DEVICE)
        if precision == "bfloat16":
            network, x = network.bfloat16(), x.bfloat16()
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)

        def losses() -> Tensor:
            with _autocast(precision):
                out = network(x)
            out = out if isinstance(out, Tensor) else out.logits
            return F.cross_entropy(out.float(), y, reduction="none")

        return network, losses

    return build


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_labels=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return ViTForImageClassification(config)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels))


MODELS = (
    Model("GPT-2 124M", "autocast", _language(_gpt2, "autocast", 50257)),
    Model("Llama 0.3B, GQA", "bfloat16", _language(_llama, "bfloat16", 32000)),
    Model("VGG-11, 1024", "float32", _images(ours.vgg11, "float32", 1024, 32, 10)),
    Model(
        "ResNet-20, 1024", "float32", _images(ours.ResNet20, "float32", 1024, 32, 10)
    ),
    Model("ViT-B/16", "autocast", _images(_vit, "autocast", 32, 224, 1000)),
    Model(
        "ResNet-50, channels last",
        "autocast",
        _images(_resnet50, "autocast", 64, 224, 1000, channels_last=True),
    ),
    Model("GPT-2 124M", "bfloat16", _language(_gpt2, "bfloat16", 50257)),
    Model("Llama 0.3B, GQA", "autocast", _language(_llama, "autocast", 32000)),
    Model("VGG-11, 1024", "autocast", _images(ours.vgg11, "autocast", 1024, 32, 10)),
    Model("ViT-B/16", "bfloat16", _images(_vit, "bfloat16", 32, 224, 1000)),
)
