"""Image data sets of the Hub, of its cache or of a folder, seen through a transform."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label", "labels")


def normalise(image: Any, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Turn an RGB image into a tensor, normalised per channel.

    **Arguments**

    - `image`: of PIL.
    - `mean`, `deviation`: three numbers each, of pixels in [0, 1].

    **Returns** `(3, height, width)`, float32.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


class Images(Dataset):
    """Hold the (image, label) pairs of a `datasets` split.

    **Arguments**

    - `rows`: a split with an image column and a label column, by any name in `IMAGE_COLUMNS` and `LABEL_COLUMNS`.
    - `transform`: RGB image of PIL -> tensor.

    **Raises**

    - `ValueError`: no such column.
    """

    def __init__(self, rows: Any, transform: Callable[[Any], Tensor]) -> None:
        image = next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)
        label = next((name for name in LABEL_COLUMNS if name in rows.column_names), None)
        if image is None or label is None:
            raise ValueError(f"`rows` must have an image and a label column, got {rows.column_names}.")
        self.rows, self.image, self.label, self.transform = rows, image, label, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        return self.transform(row[self.image].convert("RGB")), torch.tensor(row[self.label])
