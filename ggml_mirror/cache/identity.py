"""Whose states a cache may serve: everything that decides how a state is laid out, or what is in it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import llama_cpp

from .._native import ggml_versions
from ..device import devices
from ..fingerprint import fingerprint
from ..prompt_grid import PromptGrid

#: Context parameters that decide on layout or content. Not among them: numbers of threads.
_CONTEXT = (
    "n_seq_max", "n_rs_seq", "type_k", "type_v", "flash_attn_type", "swa_full", "kv_unified", "rope_scaling_type", "rope_freq_base",
    "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "attention_type",
)  # fmt: skip

#: Where weights and cache lie; kernels of different devices round differently.
_PLACEMENT = ("n_gpu_layers", "split_mode", "main_gpu")


class CacheIdentity:
    """Facts by name, as text, and a digest over them. Entries of another identity are of no use, however sound they are.

    Attributes:
        facts: name to value; for people, and for saying what differs.
        digest: 16 hexadecimal digits.
    """

    def __init__(self, facts: dict[str, str]) -> None:
        self.facts = dict(sorted(facts.items()))
        self.digest = hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:16]

    @classmethod
    def of(cls, llm: Any) -> CacheIdentity:
        """The identity of a ``Llama`` or ``DFlashLlama`` as it was opened.

        Raises:
            ModelFileError: a model's file cannot be read.
        """
        context, model = llm.context_params, llm.model_params
        found = devices()
        facts = {
            "llama_cpp": llama_cpp.__version__,
            "ggml": f"{ggml_versions().loaded} {ggml_versions().loaded_commit}",
            "system": llama_cpp.llama_print_system_info().decode("utf-8", "replace"),
            "devices": "; ".join(f"{d.name} {d.description}" for d in found),
            "n_ctx": str(llm.n_ctx()),  # some rope scalings depend on it
            "grid": str(PromptGrid.of(llm)),
            "logits_all": str(llm._logits_all),
            "kv_overrides": json.dumps(llm.kv_overrides, sort_keys=True, default=str),
            "lora": f"{fingerprint(llm.lora_path)} x {llm.lora_scale}" if llm.lora_path else "",
            **{name: str(getattr(context, name)) for name in _CONTEXT},
        }
        if any(d.type != "CPU" for d in found):
            facts |= {name: str(getattr(model, name)) for name in _PLACEMENT}
            facts |= {"offload_kqv": str(context.offload_kqv), "tensor_split": str(llm.tensor_split)}
        mirror = getattr(llm, "mirror", None)
        if mirror is None:
            return cls({**facts, "target": fingerprint(llm.model_path)})
        return cls(
            {
                **facts,
                "target": mirror.target,
                "draft": mirror.draft,
                "rows": mirror.rows,
                "dtype": mirror.dtype.value,
                "taps": str(list(llm.draft_spec.taps)),
                "n_embd": str(mirror.n_embd),
                "mirror_device": mirror.device.name,
            }
        )

    def differences(self, facts: dict[str, str]) -> str:
        """What other facts differ in, as text."""
        names = sorted(self.facts.keys() | facts.keys())
        wrong = [name for name in names if self.facts.get(name) != facts.get(name)]
        return ", ".join(f"{name} {facts.get(name)!r} (here {self.facts.get(name)!r})" for name in wrong)
