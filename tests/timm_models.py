"""Models of `timm`, imported without torchvision where that is absent.

`timm` needs torchvision for data sets and transforms only; while it is imported, empty
classes stand in for those.
"""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

from torch import nn
from transformers_models import CLASSES, Model, images, logit_classes


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (nn.Module,), {})


class _Finder:
    """Finds an empty module under every name of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stand_in():
    if importlib.util.find_spec("torchvision"):
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def model(name, **options):
    def build():
        with _stand_in():
            import timm
        return timm.create_model(name, num_classes=CLASSES, **options).eval()

    return build


SMALL = {"img_size": 32}
TIMM = [
    Model(
        f"timm {name}",
        what,
        model(name, pretrained=False, **options),
        images(32),
        logit_classes,
    )
    for name, what, options in (
        ("vit_tiny_patch16_224", "class token", SMALL | {"depth": 2}),
        ("resnet10t", "evaluation mode", {}),
        ("convnext_atto", "layer scale", {"depths": (1, 1, 1, 1)}),
        ("mixer_s32_224", "mixes over patches", SMALL),
        ("efficientnet_b0", "evaluation mode, squeezed", {}),
    )
]
