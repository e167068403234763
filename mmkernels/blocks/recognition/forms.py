"""How the blocks that are known read: digests of the methods that decide what they compute, for every role.

A class is known in a role where each of these methods reads as one of the table does, whatever it is called and
wherever it comes from. Digests: mmkernels.blocks.recognition.syntax. The versions are those of diffusers from 0.24 to
0.42; the last four projects in the table copied a class and changed it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from mmkernels.blocks.recognition.syntax import digest_of

_UP_UNTIL_32 = "to 0.31: checkpoint called in the block; copies in StableAnimator and DragAnything"
FORMS: Mapping[str, Mapping[str, Mapping[str, str]]] = {  # role: method: digest: where
    "residual block": {"forward": {"19a88359581ef819": "all"}},
    "residual block over pixels": {
        "forward": {
            "71dab37d34be57eb": "to 0.25: passes a scale for LoRA",
            "0bf5e52d3c8ced5a": "0.26: the same, where LoRA is not peft's",
            "9bfbed6aa590829f": "0.27 to 0.32",
            "a2e128c30905940f": "0.33 to 0.36",
            "6e484613e2f92186": "0.42",
        }
    },
    "residual block over frames": {"forward": {"c913dd17414d784c": "all"}},
    "mixer": {"forward": {"f45d9c1325ca4b56": "all, and Sonic's copy"}},
    "transformer": {
        "forward": {
            "50310855d2cd0ad6": "to 0.27, and MimicMotion's copy",
            "3968a706914fd952": "from 0.28",
            "80df7f8b7c6329f3": "StableAnimator",
            "b38437dce7fa9e0a": "Sonic",
        }
    },
    "transformer block over pixels": {
        "forward": {
            "614e47a36e9b4227": "0.24",
            "08afc6ef9ac506df": "0.25",
            "49d1449426c97c6f": "0.26",
            "d36b7f7fca9b1678": "0.27 to 0.29",
            "57f9a782e1459e5f": "from 0.30",
        }
    },
    "transformer block over frames": {
        "forward": {"4aebfa6769340fbd": "0.24: chunks another layer", "2882522c8cfae5b9": "from 0.25"}
    },
    "feed-forward": {
        "forward": {"e9b8f552644ced15": "to 0.26: passes a scale for LoRA", "1d3b256c960012fa": "from 0.27"}
    },
    "GEGLU": {
        "forward": {
            "ff11969d2ce249e9": "to 0.26: passes a scale for LoRA",
            "668ef6d582619055": "0.27",
            "eaf85101652581c8": "from 0.28: asks for an NPU",
        },
        "gelu": {"db6a1398f9d823dc": "to 0.31", "8c63c69ceb4bf287": "from 0.32"},
    },
    "attention": {
        "forward": {
            "49a0cbacbec733bd": "to 0.26",
            "1c762cc06c9c07fd": "0.27 and 0.28",
            "6da1571339009868": "0.29 to 0.31",
            "f9e7eddc1c2667f1": "from 0.32",
        },
        "head_to_batch_dim": {"5d5abac62f26310f": "to 0.26", "fff9472d1617de28": "from 0.27"},
        "batch_to_head_dim": {"6e66a153191677fb": "all"},
        "get_attention_scores": {"f7305a10d9b5817e": "all"},
    },
    "attention processor": {
        "__call__": {
            "0ce0608406bf9e6c": "AttnProcessor to 0.26",
            "214b741d9e7d03ca": "AttnProcessor from 0.27",
            "905684866d5a77ec": "AttnProcessor2_0 of 0.24",
            "b1832408981c70dc": "AttnProcessor2_0 of 0.25 and 0.26",
            "865ec98a448b98cc": "AttnProcessor2_0 of 0.27 to 0.29, and Sonic's copy",
            "d8600389f31a98aa": "AttnProcessor2_0 from 0.30",
            "9c565e13929ca94b": "XFormersAttnProcessor to 0.26",
            "5ebb04e0955dedc6": "XFormersAttnProcessor from 0.27",
            "315ed55b2cbd0a94": "StableAnimator's attention by xformers",
        }
    },
    "decoupled attention processor": {  # mmkernels.blocks.sources
        "__call__": {
            "eee6d4511f14a7e9": "IPAdapterAttnProcessor of 0.28 to 0.32",
            "547b906df4c78897": "the same, 0.33 to 0.36",
            "bfb40cc577d51121": "the same, 0.42",
            "25273e842c9dbdf3": "IPAdapterAttnProcessor2_0 of 0.28 to 0.32",
            "1b64b6e3bd803e7f": "the same, 0.33 to 0.36",
            "e0f3ef436dec130c": "the same, 0.42",
            "98ee7b513036f772": "Sonic's copy of IPAdapterAttnProcessor",
            "a4d03be22d732b1a": "Sonic's copy of IPAdapterAttnProcessor2_0",
            "e7a676c1aefbf455": "StableAnimator's for faces",
        }
    },
    "normalising attention processor": {"__call__": {"0c46aa12b2fd9830": "StableAnimator's for faces, as it trains"}},
    "up block": {
        "forward": {
            "cdd7effe16ea72bd": f"without attention, {_UP_UNTIL_32} and Sonic",
            "7c8023d077085032": f"with attention, {_UP_UNTIL_32}",
            "fd13b94d35663f95": "without attention, from 0.32: takes the size to enlarge to",
            "878872db0617fcf1": "with attention, from 0.32",
            "ee965c04a41f44a1": "with attention, Sonic's: passes arguments for its processors on",
        }
    },
    "upsampler": {
        "forward": {
            "138bba9b71a53696": "0.24",
            "5377b829b009c873": "0.25 and 0.26",
            "35423c62b5018d1c": "0.27 to 0.30",
            "9a5fd0a83f45e68e": "0.31",
            "d877e887ed43b889": "from 0.32",
        }
    },
}


class Form(NamedTuple):
    """A class in a role with its methods of now, and the settings of an instance that these may ask for."""

    kind: type
    role: str
    methods: tuple[Any, ...]
    settings: tuple[tuple[str, Any], ...]


by_probe: set[Form] = set()  # what reads like no known one, and a probe has found to compute the same
missed: list[Form] = []  # what `why_not_known` has given a reason against, for who would ask a probe
relied_on: list[Form] = []  # what it has let pass since a probe has


def why_not_known(module: nn.Module, role: str) -> str | None:
    """Why a module's class does not read as one of the known ones in this role, or None where it does."""
    kind = known_class(module)
    if "__call__" not in FORMS[role] and not calls_like(kind, nn.Module):
        return f"is {class_path(kind)}, which is called in a way of its own"
    reason = _why_not(kind, role)
    if reason is None:
        return None
    form = Form(kind, role, tuple(getattr(kind, name, None) for name in FORMS[role]), _settings(module))
    (relied_on if form in by_probe else missed).append(form)
    return None if form in by_probe else reason


def is_known(module: nn.Module, role: str) -> bool:
    """Whether a module's class reads as one of the known ones in this role; no probe is asked."""
    return _why_not(known_class(module), role) is None


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    plain = ((name, x) for name, x in vars(module).items() if isinstance(x, (bool, float, str, type(None))))
    return tuple(sorted((name, x) for name, x in plain if not name.startswith("_") and name not in _NOT_SETTINGS))


_NOT_SETTINGS = ("training", "gradient_checkpointing", "dropout")


def calls_like(kind: Any, base: Any) -> bool:
    """Whether what happens around forward is the same in a class and in one that it is derived from."""
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in AROUND_FORWARD)


AROUND_FORWARD = ("__call__", "_wrapped_call_impl", "_call_impl", "_conv_forward", "__getattr__")


def _why_not(kind: type, role: str) -> str | None:
    for method, known in FORMS[role].items():
        function = getattr(kind, method, None)
        if function is None:
            return f"is {class_path(kind)}, which has no {method} as a {role} has"
        if (digest := _digest(function)) not in known:
            seen = "cannot be read" if digest is None else "is not known"
            return f"is {class_path(kind)}, whose {method} {seen} as a {role}'s"
    return None


def digest_of_form(module: Any) -> str | None:
    """The digest of a module's forward."""
    kind: Any = known_class(module)
    return _digest(kind.forward)


def known_class(module: nn.Module) -> type:
    """The class of a module, of a drop-in the one that it had before."""
    return getattr(type(module), "known_class", type(module))


_digest = functools.cache(digest_of)  # of functions, since a class may be given another


def class_path(kind: type) -> str:
    """The full name of a class; of torch's layers the short one that people write."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return f"torch.nn.{kind.__qualname__}" if path.startswith("torch.nn.modules.") else path
