"""Models as people install them: is the probe right there, and what does it cost.

Each is probed in the precision it is trained in and compared with single samples of the
same graph, one `autograd.grad(losses[n])` each. Both round, and GPUs add with atomics,
so in bfloat16 they agree to some 1e-2 of a sample's squared norm. GPT-2, Llama and ViT
are those of transformers: without it they are left out, by name.
"""

from __future__ import annotations

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
from benchmarks.gpu.device import let_go, settle, wait
from benchmarks.gpu.networks import ResNet50
from benchmarks.gpu.zoo import TOLERANCE

__all__ = ["MODELS", "models"]

_ROUNDS = 7
_SINGLE = 3  # samples that are differentiated one by one

Losses = Callable[[], Tensor]
# Of a device and a size, "full" or "smoke".
Maker = Callable[[str, str], tuple[nn.Module, Losses]]


@dataclass(frozen=True)
class Model:
    """A name, a precision, and what makes the model and its losses."""

    name: str
    precision: str  # float32, autocast or bfloat16
    make: Maker


def models(
    seconds: float,
    keep: Callable[[dict], None] = lambda found: None,
    *,
    device: str = "cuda",
    size: str = "full",
) -> dict:
    """All of them, in order, as far as the time goes; `keep` gets what there is."""
    end = time.monotonic() + seconds
    found: dict = {}

    def result() -> dict:
        left_out = [name for name, row in found.items() if "skipped" in row]
        ok = all(row.get("ok") for name, row in found.items() if name not in left_out)
        return {"ok": ok, "left out": left_out, "models": found}

    for model in MODELS:
        name = f"{model.name}, {model.precision}"
        if size == "full" and time.monotonic() > end - 15:
            found[name] = {"ok": False, "error": "no time was left"}
            continue
        try:
            found[name] = _look_at(model, device, size)
        except ModuleNotFoundError as absent:
            found[name] = {"skipped": f"not installed: pip install {absent.name}"}
        except Exception as error:  # one that fails must not hide the others
            said = f"{type(error).__name__}: {error}"[:1500]
            found[name] = {"ok": False, "error": said}
        print(name, found[name], flush=True)
        keep(result())
        let_go(device)
    return result()


def _look_at(model: Model, device: str, size: str) -> dict:
    torch.manual_seed(0)
    network, losses = model.make(device, size)
    plain = _step(network, lambda: losses().mean().backward())
    plain()
    plain()
    plain_peak = _peak(plain, device)
    plain_seconds = _median(plain, device)
    probe = fm.GradientProbe(network)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        start = time.perf_counter()
        stats = _step(network, lambda: probe.backward(losses()))()
        wait(device)
        cold = time.perf_counter() - start  # with kernels compiled on the way
    first_probe = fm.GradientProbe(network)
    start = time.perf_counter()
    first_peak = _peak(_step(network, lambda: first_probe.backward(losses())), device)
    first = time.perf_counter() - start
    probed = _step(network, lambda: probe.backward(losses()))
    fused_probe = fm.GradientProbe(network, mode="fused")
    fused = _step(network, lambda: fused_probe.backward(losses()))
    fused()
    error = _worst_error(network, losses, fm.GradientProbe(network))
    return {
        "ok": error <= TOLERANCE[model.precision] and bool(stats.is_finite),
        "worst_error": error,
        "fallbacks": sorted(
            {str(w.message)[:120] for w in said if "No rule" in str(w.message)}
        ),
        "said": sorted({str(w.message)[:120] for w in said})[:8],
        "is_remembered": bool(probe._reader._structures),
        "plain_ms": 1e3 * plain_seconds,
        "cold_seconds": cold,
        "first_over_plain": first / plain_seconds,
        "first_peak_over_plain": first_peak / plain_peak if plain_peak else None,
        "observe_over_plain": _median(probed, device) / plain_seconds,
        "fused_over_plain": _median(fused, device) / plain_seconds,
    }


def _step(network: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    def step() -> object:
        network.zero_grad(set_to_none=True)
        return run()

    return step


def _median(step: Callable[[], object], device: str) -> float:
    settle(step)
    found = []
    for _ in range(_ROUNDS):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _peak(step: Callable[[], object], device: str) -> int:
    """Bytes with all that lives between steps; zero on a CPU."""
    if device == "cpu":
        step()
        return 0
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
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


def _autocast(device: str, precision: str):
    return torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")


def _language(make: Callable[[str], nn.Module], precision: str, vocabulary: int):
    def build(device: str, size: str) -> tuple[nn.Module, Losses]:
        network = make(size).to(device)
        if precision == "bfloat16":
            network = network.bfloat16()
        shape, high = ((8, 1024), vocabulary) if size == "full" else ((3, 16), 512)
        ids = torch.randint(high, shape, device=device)

        def losses() -> Tensor:
            with _autocast(device, precision):
                logits = network(ids).logits[:, :-1]
            tokens = F.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            return tokens.view(len(ids), -1).mean(1)

        return network, losses

    return build


def _gpt2(size: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if size != "full":
        config.n_layer, config.n_embd, config.n_head, config.vocab_size = 2, 64, 2, 512
    return GPT2LMHeadModel(config)


def _llama(size: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    full = size == "full"
    config = LlamaConfig(
        vocab_size=32000 if full else 512,
        hidden_size=1024 if full else 64,
        intermediate_size=2816 if full else 128,
        num_hidden_layers=16 if full else 2,
        num_attention_heads=16 if full else 4,
        num_key_value_heads=4 if full else 2,
    )
    return LlamaForCausalLM(config)


def _images(
    make: Callable[[str], nn.Module],
    precision: str,
    batch: int,
    side: int,
    classes: int,
    *,
    channels_last: bool = False,
):
    def build(device: str, size: str) -> tuple[nn.Module, Losses]:
        count, edge = (batch, side) if size == "full" else (3, 32)
        network = make(size).to(device)
        x = torch.randn(count, 3, edge, edge, device=device)
        y = torch.randint(classes, (count,), device=device)
        if precision == "bfloat16":
            network, x = network.bfloat16(), x.bfloat16()
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)

        def losses() -> Tensor:
            with _autocast(device, precision):
                out = network(x)
            out = out if isinstance(out, Tensor) else out.logits
            return F.cross_entropy(out.float(), y, reduction="none")

        return network, losses

    return build


def _vit(size: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_labels=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    if size != "full":
        config.hidden_size, config.intermediate_size, config.image_size = 64, 128, 32
        config.num_hidden_layers, config.num_attention_heads = 2, 2
    return ViTForImageClassification(config)


def _resnet50(size: str) -> nn.Module:
    return ResNet50() if size == "full" else ResNet50((1, 1, 1, 1))


def _vgg11(size: str) -> nn.Module:
    return ours.vgg11()


def _resnet20(size: str) -> nn.Module:
    return ours.ResNet20()


MODELS = (
    Model("GPT-2 124M", "autocast", _language(_gpt2, "autocast", 50257)),
    Model("Llama 0.3B, GQA", "bfloat16", _language(_llama, "bfloat16", 32000)),
    Model("VGG-11, 1024", "float32", _images(_vgg11, "float32", 1024, 32, 10)),
    Model("ResNet-20, 1024", "float32", _images(_resnet20, "float32", 1024, 32, 10)),
    Model("ViT-B/16", "autocast", _images(_vit, "autocast", 32, 224, 1000)),
    Model(
        "ResNet-50, channels last",
        "autocast",
        _images(_resnet50, "autocast", 64, 224, 1000, channels_last=True),
    ),
    Model("GPT-2 124M", "bfloat16", _language(_gpt2, "bfloat16", 50257)),
    Model("Llama 0.3B, GQA", "autocast", _language(_llama, "autocast", 32000)),
    Model("VGG-11, 1024", "autocast", _images(_vgg11, "autocast", 1024, 32, 10)),
    Model("ViT-B/16", "bfloat16", _images(_vit, "bfloat16", 32, 224, 1000)),
)
