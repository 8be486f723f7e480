"""Models: single-device code that does not know the machine."""

from turnout.models import presets
from turnout.models.decoder import Decoder, DecoderOutput, ModelConfig
from turnout.models.presets import PRESETS

__all__ = ["PRESETS", "Decoder", "DecoderOutput", "ModelConfig", "presets"]
