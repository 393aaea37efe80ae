"""The classes of PyTorch's own nodes, as its C++ headers have them."""

import re
from pathlib import Path

import pytest
import torch

# Written from derivatives.yaml when PyTorch is built: the classes of all nodes.
HEADER = Path(torch.__file__).parent / "include/torch/csrc/autograd/generated"
HEADER /= "Functions.h"
if not HEADER.exists():
    pytest.skip("this PyTorch comes without its headers", allow_module_level=True)

FIELD = re.compile(r"^  (?!void|using|return)[\w:<>, ]+ (\w+?)_?(?: = \w+)?;$", re.M)


def fields_by_node():
    """What each node saves, by the node's name."""
    classes = re.split(r"^struct TORCH_API ", HEADER.read_text(), flags=re.M)[1:]
    parts = (text.partition("\n};")[0] for text in classes)
    return {p.split(maxsplit=1)[0]: set(FIELD.findall(p)) for p in parts}


SAVED = fields_by_node()
