"""Image data sets of the Hub, of its cache or of a folder, seen through a timm transform."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Images(Dataset):
    """(image, label) pairs of a `datasets` split with an image and a label column."""

    def __init__(self, rows: Any, transform: Callable[[Any], Tensor]) -> None:
        image = next((name for name in ("image", "img") if name in rows.column_names), None)
        label = next((name for name in ("label", "fine_label", "labels") if name in rows.column_names), None)
        if image is None or label is None:
            raise ValueError(f"`rows` must have an image and a label column, got {rows.column_names}.")
        self.rows, self.image, self.label, self.transform = rows, image, label, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        return self.transform(row[self.image].convert("RGB")), torch.tensor(row[self.label])
