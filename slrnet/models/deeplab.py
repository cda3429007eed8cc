"""DeepLabV3+ on any of our encoders, for training on masks alone (paper Table 2, the multi-stage extension).

Decoder and head come from the package segmentation_models_pytorch (the extra `distill`), so the second stage is the
usual DeepLabV3+. The encoder is ours, for its weights, normalization and freezing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from torch import Tensor, nn

from slrnet.config import ModelConfig
from slrnet.models.encoders import Encoder
from slrnet.models.network import Network, Outputs
from slrnet.ops.maps import widened

__all__ = ["DeepLabV3Plus", "require_deeplab"]

SKIP_STRIDE = 4


def require_deeplab() -> None:
    """Raises `ValueError` with the command to run if the extra is not installed."""
    if find_spec("segmentation_models_pytorch") is None:
        raise ValueError(
            "model.architecture deeplabv3plus needs segmentation-models-pytorch, which is not installed; "
            "run `pip install 'slrnet[distill]'`"
        )


class DeepLabV3Plus(Network):
    """DeepLabV3+; it predicts the background like any class and has neither class scores nor codes.

    Args:
        encoder: an encoder of output stride 8 or 16, with features at stride 4.
        config: channels, dilations and dropout of the decoder.
        num_classes: K with the background.

    Raises:
        ValueError: the extra is not installed, or the encoder has other strides.
    """

    def __init__(self, encoder: Encoder, config: ModelConfig, *, num_classes: int) -> None:
        super().__init__()
        require_deeplab()
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder

        if encoder.output_stride not in (8, 16) or SKIP_STRIDE not in encoder.strides:
            raise ValueError(
                f"the encoder's features have the strides {encoder.strides}; DeepLabV3+ needs the last one at stride 8 "
                f"or 16 and one at {SKIP_STRIDE}: set model.output_stride and model.skip_stride=4, or use another "
                "model.encoder"
            )
        self.num_classes = num_classes
        self.encoder = encoder
        self._skip = max(i for i, stride in enumerate(encoder.strides) if stride == SKIP_STRIDE)
        self.decoder = DeepLabV3PlusDecoder(
            encoder_channels=(3, 0, encoder.channels[self._skip], encoder.out_channels),  # it takes the last two
            encoder_depth=5,
            out_channels=config.decoder_dim,
            atrous_rates=config.aspp_dilations,
            output_stride=encoder.output_stride,
            aspp_separable=True,
            aspp_dropout=config.dropout,
        )
        self.head = SegmentationHead(config.decoder_dim, num_classes, kernel_size=1)
        initialize_decoder(self.decoder)
        initialize_head(self.head)

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        """Maps each view (N, 3, H, W), its sides multiples of the output stride, to (N, K, H / 4, W / 4) logits."""
        return Outputs([self._decode(view) for view in views], [], [], [], [])

    def regions(self) -> list[nn.Module]:
        """Encoder, decoder and classifier."""
        return [self.encoder.backbone, self.decoder, self.head]

    def _decode(self, images: Tensor) -> Tensor:
        features = self.encoder.levels(images)
        unused = images.new_zeros(0)
        logits: Tensor = self.head(self.decoder([unused, unused, features[self._skip], features[-1]]))
        return widened(logits)
