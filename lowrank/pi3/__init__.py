"""π³, a transformer for visual geometry: the model, rendered scenes, data, metrics."""

from lowrank.pi3.model import Pi3, Pi3Config

__all__ = ["Pi3", "Pi3Config"]
