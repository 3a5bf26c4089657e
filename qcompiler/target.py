"""Targets: what a machine can run. A target parses from and prints to its string.

ort:cpu                  ONNX Runtime on the CPU that compiles
ort:cpu:vnni             … on an x86-64 CPU with AVX512-VNNI or AVX-VNNI
ort:cpu:avx2             … on an x86-64 CPU without VNNI: weights keep to 7 bits, see `saturates`
ort:cpu:arm64            … on 64-bit ARM
ort:cuda                 ONNX Runtime on NVIDIA GPUs, in float16
ort:cpu+tvm              … with linears by token on kernels generated for this machine
ort:cuda+tvm             … with quantized weights on kernels generated for GPUs
ort:cuda:sm_90+tvm       … for those of compute capability 9.0 alone; sm_80, sm_86, sm_89
tvm:x86-64               machine code for x86-64 with SSE4.2 (x86-64-v2)
tvm:x86-64:avx512vnni    … with AVX512 F, BW, CD, DQ, VL and VNNI
tvm:x86-64:avx512bf16    … with AVX512-BF16 too
tvm:x86-64-v3            … with AVX2, FMA and F16C
tvm:aarch64              machine code for 64-bit ARM with NEON (Armv8.0)
tvm:aarch64:dotprod      … with SDOT and UDOT
tvm:aarch64:i8mm         … with SMMLA and UMMLA too
tvm:aarch64:bf16         … with BFMMLA too
tvm:armv7                machine code for 32-bit ARM with NEON and VFPv4, hard float
tvm:riscv64              machine code for RV64GC
tvm:native               machine code for the machine that compiles
tvm:native:dynamic       … for any size, run by TVM's runtime in Python
tvm:cuda:sm_90           machine code for NVIDIA GPUs of compute capability 9.0; sm_80, sm_86, sm_89
torch:cpu                no machine: the formats simulated in torch, for measuring what they cost
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompiler.devices import (
    BFLOAT16,
    CPU_FEATURES,
    DEVICES,
    FLOAT8,
    KERNELS,
    cpu_feature,
    cpu_flags,
)
from qcompiler.errors import UnsupportedError, nearest
from qcompiler.qtype import QType

# Time of ONNX Runtime 1.31's MatMulNBits on a GPU, as a share of what float16 weights take: by
# tokens, then by bits of a weight. Measured on an H200: one product of 8192 × 8192, and the decode
# step of a language model 2048 wide, where products leave the GPU idle most of the time.
CUDA_SHARES = {
    1: {4: 0.48, 8: 0.79}, 4: {4: 0.70, 8: 2.2}, 16: {4: 2.1, 8: 2.2}, 64: {4: 2.0, 8: 2.4},
    512: {4: 1.4, 8: 1.7}, 2048: {4: 1.1, 8: 1.2},
}  # fmt: skip
CUDA_WIDE = 8192
CUDA_NARROW = {4: 0.87, 8: 1.14}


@dataclass(frozen=True)
class Target:
    """A runtime, a device and the device's feature that decides which kernels run.

    `kernels` names the generator of kernels that the runtime runs beside its own.
    """

    runtime: str
    device: str
    feature: str = ""
    kernels: str = ""

    def __str__(self) -> str:
        name = ":".join(part for part in (self.runtime, self.device, self.feature) if part)
        return f"{name}+{self.kernels}" if self.kernels else name

    @classmethod
    def parse(cls, text: str) -> Target:
        """The inverse of `str`.

        Unknown names give an `UnsupportedError` that names the known ones.
        """
        name, plus, kernels = text.strip().partition("+")
        runtime, _, rest = name.partition(":")
        device, _, feature = rest.partition(":")
        if runtime not in DEVICES:
            raise UnsupportedError(
                f"target '{text}': no runtime '{runtime}'; {nearest(runtime, [*DEVICES])}"
            )
        if device not in DEVICES[runtime]:
            known = [f"{runtime}:{known}" for known in DEVICES[runtime]]
            raise UnsupportedError(f"target '{text}': no device '{device}'; {nearest(text, known)}")
        if feature not in DEVICES[runtime][device]:
            known = [known for known in DEVICES[runtime][device] if known]
            hint = nearest(feature, known) if known else f"'{runtime}:{device}' has none"
            raise UnsupportedError(f"target '{text}': no feature '{feature}'; {hint}")
        found = cls(runtime, device, feature)
        return found.with_kernels(kernels) if plus else found

    def with_kernels(self, kernels: str) -> Target:
        """The same machine, with kernels of that generator beside the runtime's own.

        Raises:
            UnsupportedError: where the runtime has none of that name.
        """
        known = KERNELS.get((self.runtime, self.device), ())
        if kernels not in known:
            hint = nearest(kernels, [*known]) if known else "it runs its own alone"
            raise UnsupportedError(f"target '{self}': no kernels '{kernels}'; {hint}")
        return replace(self, kernels=kernels)

    @property
    def meaning(self) -> str:
        """What this target is, for people."""
        text = DEVICES[self.runtime][self.device][self.feature]
        here = (self.runtime, self.device, self.feature) == ("ort", "cpu", "")
        text = f"{text} ({cpu_feature()})" if here else text
        which = "linears by token" if self.device == "cpu" else "quantized weights"
        return f"{text}, {which} on kernels of {self.kernels}" if self.kernels else text

    @property
    def effective_feature(self) -> str:
        """The feature named, or else that of this machine; of `ort:cpu` alone."""
        return self.feature or cpu_feature()

    @property
    def _is_half_named(self) -> bool:
        """Whether it names the GPU generation of kernels that it has not."""
        return (self.runtime, self.device) == ("ort", "cuda") and bool(
            self.feature and not self.kernels
        )

    @property
    def any_size(self) -> bool:
        """Whether generated code takes any size, and not those alone that it is compiled for."""
        return self.runtime == "tvm" and self.feature == "dynamic"

    @property
    def saturates(self) -> bool:
        """Whether full-range u8 × s8 weights can overflow silently.

        vpmaddubsw adds two products in int16: 255·127·2 = 64770 > 32767. With weights in −64…63 the
        worst pair is 255·64·2 = 32640, which fits. Our own kernels widen before they add.
        """
        own = (self.runtime, self.device) == ("ort", "cpu") and not self.kernels
        return own and CPU_FEATURES[self.effective_feature]

    def table_refusal(self, table: QType) -> str | None:
        """Why this target cannot look up rows of an embedding table in this format, or None."""
        if table.floating and not self.reads_float8:
            return f"'{self}' has no kernel that reads {table.element}; use int8:channel"
        if table.bits == 8 and table.granularity == "channel" and table.symmetric:
            return None
        rows = "int8:channel or uint8:channel"
        if table.element != "int4" or not table.group or not table.symmetric:
            return f"embeddings are {rows}, or int4 in groups (int4:g32), not {table}"
        if self.runtime == "tvm":
            return f"embeddings of generated code are {rows}, not {table}"
        return None

    def refusal(
        self,
        weight: QType | None,
        activation: QType | None,
        cache: tuple[QType | None, QType | None] = (None, None),
        products: str = "float32",
        outliers: int = 0,
    ) -> str | None:
        """Why this target has no kernel for the formats, or None.

        Args:
            weight: of linears.
            activation: of what they read.
            cache: of cached keys and values.
            products: arithmetic of products that stay float: float32 or bfloat16.
            outliers: weights of each row that stay beside the grid.
        """
        if self._is_half_named:
            return (
                f"ONNX Runtime's own kernels run on any NVIDIA GPU: use --target ort:cuda, or add "
                f"--kernels tvm for kernels made for {self.feature}"
            )
        if outliers and (self.device == "cuda" or self.any_size):
            return (
                f"no kernel of '{self}' reads single weights beside the grid (~{outliers}); it has "
                f"them for whole columns (+{outliers})"
            )
        if products == "bfloat16" and not self.multiplies_bfloat16:
            known = [Target.parse(t) for t in known_targets()]
            able = [str(t) for t in known if t.narrows_all or t.feature in BFLOAT16]
            why = {
                "ort:cpu": "ONNX Runtime's CPU kernels have no bfloat16 products here",
                "ort:cuda": "all of a model is float16, or bfloat16 (--set products=bfloat16)"
                if self.narrows_all
                else "generated kernels read float16; leave --kernels out",
            }.get(f"{self.runtime}:{self.device}", "it has no bfloat16 products")
            return f"{why}; use --set products=float32, or {' or '.join(able)}"
        reason = _cache_refusal(self, *cache) if any(cache) else None
        if reason:
            return reason
        if weight is not None and weight.dynamic:
            return f"weights have one scale for the tensor, a channel or a group, not {weight}"
        if self.runtime == "torch":  # every format has its arithmetic in `qcompiler.ops`
            return None
        if any(kind is not None and kind.floating for kind in (weight, activation)):
            return _float8_refusal(self, weight, activation)
        if self.quantizes_itself(weight, activation):
            activation = None
        if self.device == "cuda":
            if self.runtime == "tvm":
                return _cuda_refusal(weight, activation)
            if not self.kernels:
                return _ort_cuda_refusal(weight, activation)
            return _ort_refusal(weight, None) or _cuda_refusal(weight, activation)
        if self.kernels:
            if weight is None or activation is None or activation.granularity != "token":
                return (
                    f"--kernels {self.kernels} computes linears whose inputs are quantized for "
                    "each token (w4a8, w8a8-token); leave it out, or use --set "
                    "activations=int8:token"
                )
            return _tvm_refusal(weight, activation)
        return (_ort_refusal if self.runtime == "ort" else _tvm_refusal)(weight, activation)

    def share_of_float(self, bits: int, tokens: int, width: int = CUDA_WIDE) -> float:
        """Time of a product with such weights as a share of the same with float weights.

        1 where it was not measured: for all targets but `ort:cuda`. `width` is the typical size of
        a weight's sides.
        """
        if (self.runtime, self.device) != ("ort", "cuda"):
            return 1.0
        bits = 8 if bits > 4 else 4
        if tokens == 1 and width < CUDA_WIDE:
            return CUDA_NARROW[bits]
        return CUDA_SHARES[max(n for n in CUDA_SHARES if n <= tokens)][bits]

    @property
    def narrows_all(self) -> bool:
        """Whether a recipe's bfloat16 is that of the whole model, not of its products alone."""
        return (self.runtime, self.device, self.kernels) == ("ort", "cuda", "")

    def products_apart(self, asked: str) -> str:
        """The arithmetic of products apart from the rest's, where a recipe asks for that."""
        return "float32" if self.narrows_all else asked

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether it has an instruction for products of bfloat16 numbers (or needs none)."""
        if self.device == "native":
            return not self.any_size and bool(set(BFLOAT16.values()) & cpu_flags())
        return self.runtime == "torch" or self.feature in BFLOAT16

    @property
    def reads_float8(self) -> bool:
        """Whether generated code has instructions for 8-bit floats (or it needs none)."""
        own = self.runtime == "tvm" and self.device == "cuda" and self.feature in FLOAT8
        return self.runtime == "torch" or own

    def quantizes_itself(self, weight: QType | None, activation: QType | None) -> bool:
        """Whether its kernel for such weights quantizes float activations on its own.

        ONNX Runtime's MatMulNBits does, at accuracy level 4: to int8, a scale for each block, which
        is finer than one for each token.
        """
        return (
            (self.runtime, self.device) == ("ort", "cpu")
            and not self.kernels
            and weight is not None
            and (weight.bits == 8 or (weight.bits <= 4 and weight.group is not None))
            and activation is not None
            and (activation.bits, activation.granularity) == (8, "token")
        )

    @property
    def outlier_bytes(self) -> int:
        """Of the value of a weight beside the grid: float16 in ONNX, float32 in generated code.

        That reads float32, because not every CPU has float16. The column's number comes on top.
        """
        return 4 if self.runtime == "tvm" else 2

    def stored_bits(self, weight: QType) -> int:
        """Bits that one weight takes there: ONNX Runtime's own kernels read 4 and 8."""
        if self.runtime != "ort" or self.kernels:
            return weight.bits
        return 4 if weight.bits <= 4 else 8


def _float8_refusal(target: Target, weight: QType | None, activation: QType | None) -> str | None:
    if not target.reads_float8:
        able = " and ".join(f"tvm:cuda:{feature}" for feature in FLOAT8)
        return (
            f"'{target}' has no products of 8-bit floats; {able} have them, and torch:cpu measures "
            "what they cost; use int8 (w8a8-token)"
        )
    rows = weight is not None and weight.floating and not weight.group
    tokens = activation is not None and activation.floating and activation.granularity == "token"
    if not rows or not tokens:
        return (
            "GPU targets multiply float8_e4m3:channel weights with float8_e4m3:token activations, "
            f"not {weight} with {activation or 'float ones'}"
        )
    return None


def _ort_refusal(weight: QType | None, activation: QType | None) -> str | None:
    if weight is not None and weight.bits not in (2, 3, 4, 6, 8):
        return (
            f"ONNX has no {weight.element} tensor that ONNX Runtime's kernels read; use 8 bits or "
            "fewer"
        )
    if activation is None:
        return None
    if activation.bits != 8 or activation.granularity != "tensor":
        return (
            f"ONNX Runtime multiplies 8-bit activations with one scale per tensor, not {activation}"
        )
    if activation.dynamic and (activation.element, activation.symmetric) != ("uint8", False):
        return (
            "ONNX Runtime computes dynamic ranges for uint8:tensor:affine:dynamic alone, "
            f"not {activation}"
        )
    if activation.reduced:
        return f"ONNX Runtime's QuantizeLinear fills all 8 bits of activations, not {activation}"
    if weight is None or weight.bits != 8 or weight.granularity == "group":
        return f"ONNX Runtime has no kernel for {weight} weights with {activation} activations"
    return None


def _ort_cuda_refusal(weight: QType | None, activation: QType | None) -> str | None:
    if activation is not None:
        return (
            "ONNX Runtime's CUDA provider takes two to six times as long for int8 activations as "
            "for float16: leave them float (w4a16, w8a16, w8, fp32), or compile kernels for those "
            "by token (--kernels tvm: w8a8-token, w4a8)"
        )
    return _ort_refusal(weight, None)


def _cache_refusal(target: Target, keys: QType | None, values: QType | None) -> str | None:
    """Why nothing keeps a cache in these formats, or None."""
    kinds = [kind for kind in (keys, values) if kind is not None]
    fixed = [kind.granularity in ("tensor", "channel") for kind in kinds]
    if not any(fixed) and target.runtime == "torch":
        return None  # simulated
    good = all(
        kind.element in ("int8", "int4") and kind.symmetric and not kind.dynamic for kind in kinds
    )
    if not all(fixed) or not good or len(kinds) < 2 or kinds[0] != kinds[1]:
        simulated = "have ranges taken at run time (float8_e4m3:token, int4:g32)"
        more = simulated if target.runtime == "torch" else "can be measured on torch:cpu"
        return (
            "a cache is kept as int8:channel, int4:channel, int8:tensor or int4:tensor, keys and "
            f"values alike, not {keys} and {values}; other formats {more}"
        )
    if target.runtime == "tvm" and target.device != "cuda":
        return (
            "generated code keeps its key-value cache in float on CPUs; compile for ort:cpu, or "
            "leave it in float (--set keys=none --set values=none)"
        )
    return None


def _cuda_refusal(weight: QType | None, activation: QType | None) -> str | None:
    if activation is not None:
        if activation.bits != 8 or activation.granularity != "token":
            return f"GPU targets read float activations, or 8 bits by token, not {activation}"
        four = weight is not None and weight.bits == 4 and weight.group is not None
        if weight is None or ((weight.bits != 8 or weight.group) and not four):
            return (
                f"GPU targets multiply {activation} with int8:channel weights, or int4 in groups, "
                f"not {weight}"
            )
        if four and (activation.element, activation.symmetric) != ("int8", True):
            return f"GPU targets multiply {weight} with int8:token activations, not {activation}"
    if weight is None:
        return None
    if weight.bits not in (4, 8) or not weight.symmetric:
        return f"GPU targets read symmetric weights of 4 or 8 bits as yet, not {weight}"
    if weight.group not in (None, 32, 64, 128):
        return f"GPU targets read groups of 32, 64 or 128 as yet, not {weight}"
    return None


def _tvm_refusal(weight: QType | None, activation: QType | None) -> str | None:
    if weight is not None and weight.bits not in (2, 3, 4, 8):
        return f"weights have 8, 4, 3 or 2 bits, not {weight}"
    if activation is None:
        return None
    if activation.bits != 8 or activation.granularity not in ("tensor", "token"):
        return f"activations have 8 bits and one scale per tensor or token, not {activation}"
    if weight is None:
        return (
            f"{activation} activations are multiplied with integer weights; give weights a format"
        )
    return None


def known_targets() -> list[str]:
    """All target strings, those with another generator's kernels for CPUs without a feature."""
    own = [
        Target(runtime, device, feature)
        for runtime, devices in DEVICES.items()
        for device, features in devices.items()
        for feature in features
    ]
    more = [
        replace(target, kernels=kernels)
        for target in own
        for kernels in KERNELS.get((target.runtime, target.device), ())
        if target.device == "cuda" or not target.feature
    ]
    return [str(target) for target in (*own, *more) if not target._is_half_named]
