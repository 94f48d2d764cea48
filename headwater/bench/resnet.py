"""The model that dense rounds are measured on: the 161 tensors of ResNet-50, 25.6 M float32."""

from __future__ import annotations

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Channels inside the blocks of each stage, and how many blocks; a block gives four times its channels."""


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter (He et al. 2015, table 1; names as in torchvision)."""
    shapes: dict[str, tuple[int, ...]] = {}
    _convolution(shapes, "conv1", "bn1", 3, 64, 7)
    inputs = 64
    for stage, (channels, blocks) in enumerate(_STAGES, start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            _convolution(shapes, f"{name}.conv1", f"{name}.bn1", inputs, channels, 1)
            _convolution(shapes, f"{name}.conv2", f"{name}.bn2", channels, channels, 3)
            _convolution(shapes, f"{name}.conv3", f"{name}.bn3", channels, 4 * channels, 1)
            if block == 0:
                skip = f"{name}.downsample"
                _convolution(shapes, f"{skip}.0", f"{skip}.1", inputs, 4 * channels, 1)
            inputs = 4 * channels
    shapes["fc.weight"], shapes["fc.bias"] = (1000, inputs), (1000,)
    return shapes


def _convolution(
    shapes: dict[str, tuple[int, ...]], name: str, normalisation: str, inputs: int, outputs: int, size: int
) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs, size, size)
    shapes[f"{normalisation}.weight"] = shapes[f"{normalisation}.bias"] = (outputs,)
