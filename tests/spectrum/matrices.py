"""Dense symmetric matrices with known spectra."""

import torch


def rotated(eigenvalues, dtype=torch.float64, seed=0, device="cpu"):
    """A symmetric matrix with these eigenvalues in a random orthonormal basis."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    size = len(values), len(values)
    square = torch.randn(
        size, generator=generator, dtype=torch.float32, device="cpu"
    ).double()
    q = torch.linalg.qr(square)[0]
    return ((q * values) @ q.T).to(device, dtype)


def bulk(size, width, seed=1):
    """Small eigenvalues of both signs."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    return (width * drawn).tolist()


SPECTRA = {
    "outliers": [9.0, 7.0, 5.0, *bulk(120, 0.2)],
    "triple": [5.0, 5.0, 5.0, *bulk(100, 0.2)],
    "both signs": [3.0, 3.0, -3.0, -3.0, *bulk(60, 0.2)],
    "dominant negative": [-9.0, 3.0, 2.0, *bulk(60, 0.2)],
    "negative definite": [-1.0, -1.5, -2.0, -3.0, -3.0, -4.0],
    "identity": [1.0] * 12,
    "zero": [0.0] * 7,
    "one by one": [2.0],
}


class Counted:
    """A matrix that counts its products and shows nothing but shape and @."""

    def __init__(self, matrix, gradient=None):
        self._matrix, self.products = matrix, 0
        self.shape, self.dtype = matrix.shape, matrix.dtype
        self.gradient, self.device = gradient, matrix.device

    def __matmul__(self, v):
        self.products += 1
        return self._matrix @ v


def wanted(eigenvalues, which, k):
    """The true answer, sorted as top_eigenpairs sorts it."""
    if which == "magnitude":
        return sorted(eigenvalues, key=lambda e: -abs(e))[:k]
    return sorted(eigenvalues, reverse=which == "largest")[:k]
