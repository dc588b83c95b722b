"""The loaded model."""

from __future__ import annotations


class SdModelData:
    """Holds the model; `sd_model` only looks and never loads."""

    def __init__(self):
        self.sd_model = None

    def get_sd_model(self):
        return self.sd_model

    def set_sd_model(self, model) -> None:
        self.sd_model = model


model_data = SdModelData()
