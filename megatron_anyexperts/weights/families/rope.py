"""Rotary positions of released models, scaled or not, as Megatron's flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's `--use-rope-scaling` has built in."""

_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}
"""Options of yarn and their defaults; `mscale` and `mscale_all_dim` count as a pair."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: base of the frequencies.
        share: share of a head's width that is rotated.
        kind: `default`, `linear`, `llama3` or `yarn`; any other is refused by `problems`.
        options: what scaling needs, by the names of config.json.
    """

    theta: float
    share: float = 1.0
    kind: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, Any], share: float = 1.0) -> Rope:
        """From `rope_parameters` as transformers 5 has them."""
        options = {
            key: value
            for key, value in values.items()
            if key not in ("rope_theta", "rope_type", "type", "partial_rotary_factor") and value is not None
        }
        kind = values.get("rope_type") or values.get("type") or "default"
        return cls(values["rope_theta"], values.get("partial_rotary_factor", share), kind, options)

    def flags(self) -> dict[str, Any]:
        """Megatron's flags."""
        kind = "yarn" if self.kind == "yarn" else "rope"
        flags = {"position-embedding-type": kind, "rotary-percent": self.share, "rotary-base": int(self.theta)}
        factor = self.options.get("factor")
        if self.kind == "linear":
            flags["rotary-seq-len-interpolation-factor"] = int(factor)
        elif self.kind == "llama3":
            flags |= {"use-rope-scaling": True, "rope-scaling-factor": float(factor)}
        elif self.kind == "yarn":
            flags |= self._yarn(float(factor))
        return flags

    def latent_flags(self) -> dict[str, Any]:
        """Megatron's flags for multi-latent attention, which has rotary positions of its own."""
        flags = {"position-embedding-type": "rope", "rotary-base": int(self.theta)}
        if self.kind == "yarn":
            return flags | {"rope-type": "yarn"} | self._yarn(float(self.options["factor"]))
        return flags | {"rope-type": "rope", "no-rope-fusion": True}

    def _yarn(self, factor: float) -> dict[str, Any]:
        options = _YARN | dict(self.options)
        flags = {
            "rotary-scaling-factor": factor,
            "yarn-original-max-position-embeddings": int(options["original_max_position_embeddings"]),
            "yarn-beta-fast": float(options["beta_fast"]),
            "yarn-beta-slow": float(options["beta_slow"]),
        }
        if options.get("mscale") and options.get("mscale_all_dim"):
            flags |= {"mscale": float(options["mscale"]), "mscale-all-dim": float(options["mscale_all_dim"])}
        if not options["truncate"]:
            flags["no-yarn-correction-range-round-to-int"] = True
        return flags

    def problems(self) -> list[str]:
        """Why Megatron would compute something else."""
        if self.kind not in ("default", "linear", "llama3", "yarn"):
            return [f"rope_type={self.kind!r} (mapped: default, linear, llama3, yarn)"]
        factor = self.options.get("factor")
        found = [] if float(self.theta).is_integer() else [f"rope_theta={self.theta}: Megatron takes whole numbers"]
        if self.kind != "default" and factor is None:
            found.append(f"rope_type={self.kind!r} without a factor")
        elif self.kind == "linear" and not float(factor).is_integer():
            found.append(f"a linear rope factor of {factor}: Megatron takes whole numbers")
        if self.kind == "llama3":
            found += [
                f"rope {name}={self.options.get(name)} (Megatron has {value} built in)"
                for name, value in LLAMA3.items()
                if self.options.get(name) != value
            ]
        if self.kind == "yarn":
            found += self._yarn_problems()
        return found

    def _yarn_problems(self) -> list[str]:
        options = self.options
        unknown = options.keys() - _YARN.keys() - {"factor", "original_max_position_embeddings"}
        unknown -= {"mscale", "mscale_all_dim", "finetuned", "rope_interleaved"}
        found = [f"rope {name}={options[name]!r} is not mapped" for name in sorted(unknown)]
        if bool(options.get("mscale")) != bool(options.get("mscale_all_dim")):
            found.append("rope has one of mscale and mscale_all_dim; both or none are mapped")
        if options.get("attention_factor") is not None:
            found.append(f"rope attention_factor={options['attention_factor']}: Megatron derives it from the factor")
        if "original_max_position_embeddings" not in options:
            found.append("rope of type yarn without original_max_position_embeddings")
        if self.share != 1.0:
            found.append(f"partial_rotary_factor={self.share} with yarn: Megatron rotates the whole head then")
        return found
