"""The runs and layouts that test_layouts.py goes through: for each case a network, a reference, and a table."""

import dataclasses
from types import ModuleType
from typing import Any

from reference import plain_dit, plain_mmdit, plain_pixart, plain_uvit

Layout = tuple[int, dict[str, Any]]  # ranks, section `parallel`

ONE: Layout = (1, {})
DIST_OPT_OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A network's reference, what its run has beside that of tests/tiny.py, its layouts, those in bf16 too."""

    plain: ModuleType
    sections: dict[str, dict[str, Any]]
    layouts: dict[str, Layout]
    bf16: tuple[str, ...] = ()
    labels: bool = False  # the data set with classes

    @property
    def steps(self) -> int:
        return int(self.sections["train"]["steps"])


def table(blocks: list[int], over_four: list[int], *, others: dict[str, Layout]) -> dict[str, Layout]:
    """A dozen layouts with every mechanism; `blocks` on two stages, `over_four` on two times two chunks."""
    two, four = {"pp": 2, "pp_split": blocks}, {"pp": 2, "vpp": 2, "pp_split": over_four}
    return {
        "one process": ONE,
        "one process, micro-batches of 2": (1, {"micro_batch": 2}),
        "recompute": (1, {"recompute": "full"}),
        "TP2": (2, {"tp": 2}),
        "TP2 + SP": (2, {"tp": 2, "sp": True}),
        f"PP2, {blocks[0]}+{blocks[1]} blocks": (2, two),
        "PP2 x VPP2": (2, four),
        "TP2 x PP2 + SP, recompute": (4, {**two, "tp": 2, "sp": True, "recompute": "full"}),
        "DP2, dist-opt, overlap": (2, DIST_OPT_OVERLAP),
        "CP2": (2, {"cp": 2}),
        "TP2 x CP2 + SP": (4, {"tp": 2, "cp": 2, "sp": True}),
        "CP2 x PP2": (4, {**two, "cp": 2}),
        **others,
    }


MMDIT: dict[str, Layout] = {
    "one process":                          ONE,
    "one process, micro-batches of 2":      (1, {"micro_batch": 2}),
    "recompute":                            (1, {"recompute": "full"}),
    "TP2":                                  (2, {"tp": 2}),
    "TP4":                                  (4, {"tp": 4}),
    "TP2 + SP":                             (2, {"tp": 2, "sp": True}),
    "PP2":                                  (2, {"pp": 2}),
    "PP2 uneven 1+3":                       (2, {"pp": 2, "pp_split": [1, 3]}),
    "PP4":                                  (4, {"pp": 4}),
    "TP2 x PP2, as if on one GPU":          (4, {"tp": 2, "pp": 2, "share_gpu": True}),
    "TP2 x PP2 + SP":                       (4, {"tp": 2, "pp": 2, "sp": True}),
    "TP2 x PP2 + SP, recompute":            (4, {"tp": 2, "pp": 2, "sp": True, "recompute": "full"}),
    "PP2 x VPP2":                           (2, {"pp": 2, "vpp": 2}),
    "TP2 x PP2 x VPP2 + SP":                (4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "micro_batch": 2}),
    "DP2":                                  (2, {}),
    "DP2, overlap":                         (2, {"overlap_grad_reduce": True}),
    "DP2, dist-opt":                        (2, {"distributed_optimizer": True}),
    "DP2, dist-opt, overlap":               (2, DIST_OPT_OVERLAP),
    "DP4, dist-opt":                        (4, {"distributed_optimizer": True}),
    "TP2 x DP2 + SP, dist-opt":             (4, {"tp": 2, "sp": True, "distributed_optimizer": True}),
    "PP2 x DP2, dist-opt":                  (4, {"pp": 2, "distributed_optimizer": True}),
    "PP2 x DP2, dist-opt, overlap":         (4, {"pp": 2, **DIST_OPT_OVERLAP}),
    "PP2 x VPP2 x DP2, dist-opt, overlap":  (4, {"pp": 2, "vpp": 2, **DIST_OPT_OVERLAP}),
    "CP2":                                  (2, {"cp": 2}),
    "CP2 x DP2, dist-opt":                  (4, {"cp": 2, "distributed_optimizer": True}),
    "TP2 x CP2 + SP":                       (4, {"tp": 2, "cp": 2, "sp": True}),
    "CP2 x PP2":                            (4, {"cp": 2, "pp": 2}),
}  # fmt: skip

# Beside fp32: each mechanism once, as bf16's own code (main weights, gradients' types) is the same in every layout.
_MMDIT_BF16 = (
    "one process",
    "TP2 + SP",
    "TP2 x PP2 + SP",
    "TP2 x PP2 x VPP2 + SP",
    "DP2, dist-opt, overlap",
    "PP2 x VPP2 x DP2, dist-opt, overlap",
    "CP2 x PP2",
)

# With seed 187 timestep 0, whose loss is another one, is drawn in steps 3 and 4.
DDPM = {"objective": {"kind": "ddpm"}, "train": {"steps": 12, "seed": 187}}

_DIT: dict[str, Any] = {**DDPM, "data": {"text": "labels"}}
_DIT_MODEL = {"arch": "dit", "text_tokens": 1, "learn_sigma": True, "qk_norm": False}
_PIXART_MODEL = {"arch": "pixart", "learn_sigma": True}
_UVIT_MODEL = {"arch": "uvit", "depth": 5, "text_tokens": 7}  # 1 + 7 + 16 tokens divide by tp x cp
_EVEN = {"PP2, 2+2 blocks": (2, {"pp": 2}), "TP2 x PP2 + SP": (4, {"tp": 2, "pp": 2, "sp": True})}
_HALF_AS_DEEP = {"mup": {"parametrization": "completep", "base_depth": 2}}

CASES: dict[str, Case] = {
    "mmdit": Case(plain=plain_mmdit, sections={"train": {"steps": 20}}, layouts=MMDIT, bf16=_MMDIT_BF16),
    "dit": Case(
        plain=plain_dit,
        sections={**_DIT, "model": _DIT_MODEL},
        layouts=table([1, 3], [1, 1, 1, 1], others=_EVEN),
        bf16=("TP2 x PP2 + SP",),
        labels=True,
    ),
    "pixart": Case(
        plain=plain_pixart,
        sections={**DDPM, "model": _PIXART_MODEL},
        layouts=table(
            [3, 1], [1, 1, 1, 1], others={**_EVEN, "TP2 + SP, compiled": (2, {"tp": 2, "sp": True, "compile": True})}
        ),
        bf16=("TP2 x PP2 + SP",),
    ),
    # Blocks 0 and 1 leave skips for blocks 4 and 3.
    "uvit": Case(
        plain=plain_uvit,
        sections={**DDPM, "model": _UVIT_MODEL},
        layouts=table(
            [3, 2],
            [1, 1, 2, 1],
            others={
                "PP2, 1+4 blocks": (2, {"pp": 2, "pp_split": [1, 4]}),
                "TP2 x PP2 + SP": (4, {"tp": 2, "pp": 2, "sp": True, "pp_split": [2, 3]}),
                "PP4": (4, {"pp": 4, "pp_split": [1, 2, 1, 1]}),
                "PP4, micro-batches of 1": (4, {"pp": 4, "pp_split": [2, 1, 1, 1], "micro_batch": 1}),
            },
        ),
        bf16=("TP2 x PP2 + SP",),
    ),
    "mmdit completep": Case(
        plain=plain_mmdit,
        sections={**_HALF_AS_DEEP, "train": {"steps": 12}},
        layouts={"one process": ONE, "TP2 x PP2": (4, {"tp": 2, "pp": 2})},
    ),
    "dit completep": Case(
        plain=plain_dit,
        sections={**_DIT, **_HALF_AS_DEEP, "model": _DIT_MODEL},
        layouts={"one process": ONE, "TP2 x PP2": (4, {"tp": 2, "pp": 2})},
        labels=True,
    ),
    "pixart completep": Case(
        plain=plain_pixart, sections={**DDPM, **_HALF_AS_DEEP, "model": _PIXART_MODEL}, layouts={"one process": ONE}
    ),
    "uvit completep": Case(
        plain=plain_uvit, sections={**DDPM, **_HALF_AS_DEEP, "model": _UVIT_MODEL}, layouts={"one process": ONE}
    ),
}
