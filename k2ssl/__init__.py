"""k2ssl: self-supervised speech pre-training with Zipformer encoders."""

__version__ = "0.1.0"
