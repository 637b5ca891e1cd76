"""explain/smoothing.py: the mean of maps over flips and shifts."""

import torch
import torch.nn.functional as F

from explain.smoothing import smoothed


def test_smoothed_is_the_mean_of_maps_moved_back():
    """A map that is the image itself comes back exactly, whatever the flip and the shift; with a
    layer of half the size, it is the mean of ten maps moved back by hand."""
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose(smoothed(lambda b: {"a": b[:, 0]}, x)["a"], x[:, 0])

    def raw(batch):
        return {"a": F.max_pool2d(batch, 2)[:, 1]}

    expected, shown = torch.zeros(2, 32, 48), torch.zeros(2, 32, 48)
    for flip in (False, True):
        for dy, dx in ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2)):
            view = x.flip(3) if flip else x
            rows, columns = torch.arange(32) - dy, torch.arange(48) - dx
            view = view[:, :, rows.clamp(0, 31)][:, :, :, columns.clamp(0, 47)]
            maps = F.interpolate(raw(view)["a"][:, None], (32, 48), mode="bilinear")[:, 0]
            for row in range(32):
                for column in range(48):
                    y, z = row + dy, (47 - column if flip else column) + dx
                    if 0 <= y < 32 and 0 <= z < 48:
                        expected[:, row, column] += maps[:, y, z]
                        shown[:, row, column] += 1
    torch.testing.assert_close(
        smoothed(raw, x)["a"], (expected / shown).to(x.dtype), atol=1e-5, rtol=0
    )
