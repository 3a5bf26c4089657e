"""Format: how one layer's weight and what it reads are stored."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.errors import InputError
from qcompiler.qtype import QType

FLOAT, NARROW = "float", "bfloat16"


@dataclass(frozen=True)
class Format:
    """The number formats of a linear or convolution; None is float.

    Written `int8:channel/uint8:tensor:affine` (weight, then activation), `int4:g32` for weights
    alone, `float` for neither; `int4:g32+16` keeps the 16 input columns of the weight in float that
    lose most by rounding, `int4:g32~4` the 4 weights of each output row that do. `bfloat16` is a
    float product whose operands are rounded to bfloat16 (`narrow`), see `round_products`.
    """

    weight: QType | None = None
    activation: QType | None = None
    columns: int = 0
    narrow: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.weight is None and self.activation is not None:
            raise InputError(
                f"format: activations of {self.activation} need a quantized weight; write "
                f"{'float8_e4m3' if self.activation.floating else 'int8'}:channel/{self.activation}"
            )
        if (self.columns or self.outliers) and self.weight is None:
            raise InputError(
                "format: columns and single weights stay in float beside a quantized weight alone"
            )
        if self.columns and self.outliers:
            raise InputError(
                "format: keep columns (int4:g32+16) or single weights (int4:g32~4) in float, not "
                "both"
            )

    def __str__(self) -> str:
        if self.weight is None:
            return NARROW if self.narrow else FLOAT
        kept = f"+{self.columns}" if self.columns else ""
        kept = f"~{self.outliers}" if self.outliers else kept
        return f"{self.weight}{kept}" + (f"/{self.activation}" if self.activation else "")

    @classmethod
    def parse(cls, text: str) -> Format:
        """The inverse of `str`.

        Raises:
            InputError: an unknown number format, with the nearest known one.
        """
        if text.strip() == NARROW:
            return cls(narrow=True)
        if text.strip() in ("float16", "fp16"):
            raise InputError(
                f"format '{text}': no kernel multiplies float16 on CPUs, which would convert it to "
                "float32; write bfloat16, for tvm: CPUs that have it, or float"
            )
        weight, _, activation = text.strip().partition("/")
        weight, tilde, outliers = weight.partition("~")
        weight, plus, columns = weight.partition("+")
        if plus and not (columns.isdigit() and int(columns) > 0):
            raise InputError(f"format '{text}': write int4:g32+16 for 16 columns in float")
        if tilde and not (outliers.isdigit() and int(outliers) > 0):
            raise InputError(
                f"format '{text}': write int4:g32~4 for 4 weights of each row in float"
            )

        def kind(part: str) -> QType | None:
            return None if part in ("", FLOAT, "none") else QType.parse(part)

        return cls(kind(weight), kind(activation), int(columns or 0), outliers=int(outliers or 0))

    @property
    def bits(self) -> int:
        """Bits of one weight, scales not counted."""
        if self.weight is not None:
            return self.weight.bits
        return 16 if self.narrow else 32

    @property
    def products(self) -> str:
        """Arithmetic of its products, as `Recipe.products` names it."""
        return "bfloat16" if self.narrow else "float32"
