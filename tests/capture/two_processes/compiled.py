"""Statistics of compiled models under DistributedDataParallel and `fully_shard`."""

import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rank_checks import check
from scenarios import check_training
from setting import build_block, losses_of, share, words
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastminima as fm


@contextmanager
def compiling(*, optimize_ddp):
    """Fresh code in the context, in which no region may run again."""
    config = torch._dynamo.config
    before = config.optimize_ddp
    torch._dynamo.reset()
    config.optimize_ddp = optimize_ddp
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*once more, uncompiled")
            yield
    finally:
        config.optimize_ddp = before
        torch._dynamo.reset()


def regions(model):
    """Compiled nodes in the graph of a model's losses."""
    met, waiting = set(), [losses_of(model, share(words())).grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in met:
            met.add(node)
            waiting += [child for child, _ in node.next_functions]
    return sum(node.name() == "CompiledFunctionBackward" for node in met)


def check_replicas(*, optimize_ddp, buckets, **options):
    def make():
        model = DistributedDataParallel(build_block(), **options)
        return fm.compile(model, backend="aot_eager")

    with compiling(optimize_ddp=optimize_ddp):
        assert (regions(make()) > 1) == buckets
        check_training(make, words(), "_orig_mod.module.", False, build=build_block)


@check
def compiled_replicas():
    check_replicas(optimize_ddp=True, buckets=False)


@check
def compiled_replicas_in_buckets():
    """The compiler cuts the graph where buckets end."""
    before = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 900
    try:
        check_replicas(optimize_ddp=True, buckets=True, bucket_cap_mb=0.001)
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = before


@check
def compiled_replicas_in_one_graph():
    check_replicas(optimize_ddp=False, buckets=False)


@check
def replicas_of_a_compiled_model():
    def make():
        model = fm.compile(build_block(), backend="aot_eager")
        return DistributedDataParallel(model)

    with compiling(optimize_ddp=True):
        assert regions(make()) == 1
        check_training(make, words(), "module._orig_mod.", False, build=build_block)


@check
def compiled_blocks_under_fully_shard():
    """Each block compiled and sharded, as users do it."""

    def make():
        model = build_block()
        for layer in model.layers:
            layer.forward = fm.compile(layer.forward, backend="aot_eager")
            fully_shard(layer)
        fully_shard(model)
        return model

    with compiling(optimize_ddp=True):
        assert regions(make()) == 2
        check_training(make, words(), "", False, build=build_block)
