"""Models: single-device code that does not know the machine."""

from turnout.models import presets
from turnout.models.decoder import Decoder, DecoderOutput, ModelConfig

__all__ = ["Decoder", "DecoderOutput", "ModelConfig", "presets"]
