"""Embeddings of samples and similarities of layers, for audit.py: of the docstrings of `diffusion`, `embedding` and
`similarity`."""

import itertools

import numpy as np
from scipy import stats
from sklearn.feature_selection import mutual_info_regression


def embedded(distances, c):
    """(L, N, d): the diffusion map or the principal components of each layer's distances; None of others."""
    found, d = [], c["dimensions"]
    for own in distances:
        if c["embedding"].startswith("diffusion"):
            found.append(diffusion(own, c)[0][:, :d])
        elif c["embedding"] == "pca":
            centre = np.eye(len(own)) - 1 / len(own)
            values, vectors = np.linalg.eigh(-centre @ own**2 @ centre / 2)
            found.append(vectors[:, ::-1][:, :d] * np.sqrt(np.maximum(values[::-1][:d], 0)))
        else:
            return None
    return np.stack(found)


def diffusion(d, c):
    """Coordinates (N, N - 1), singular values or |eigenvalues| (N,), and the diffusion matrix, of distances (N, N)."""
    sigma = np.median(d[np.triu_indices(len(d), 1)]) if c["sigma"] == "median" else c["sigma"]
    if c["embedding"] == "diffusion":
        k = np.exp(-np.sqrt(d / sigma))
        p = k.sum(1)
        k = k / np.outer(p, p) ** c["anisotropy"]
        v = np.sqrt(k.sum(1))
        total = k / np.outer(v, v)
        u, s, _ = np.linalg.svd(total)
        return u[:, 1:] / u[:, :1], s, total
    k = np.exp(-(d**2) / (2 * sigma**2))
    total = k / k.sum(1, keepdims=True)
    s, right = np.linalg.eig(total)
    order = np.argsort(-np.abs(s))
    s, right = np.abs(s[order].real), right[:, order].real
    return right[:, 1:] / np.linalg.norm(right[:, 1:], axis=0) * s[1:] ** c["anisotropy"], s, total


def similarity(embedding, c, shuffle=None):
    """npib or gaussian of (L, N, d) coordinates, NaN where the entropies leave it undefined. shuffle (L, N): the order
    of each layer's samples against those of the layers up to it, itself included."""
    n_layers, n, _ = embedding.shape
    others = embedding if shuffle is None else np.stack([x[o] for x, o in zip(embedding, shuffle, strict=True)])
    entropy, information = np.zeros(n_layers), np.zeros((n_layers, n_layers))
    if c["measure"] == "npib":
        ranks, others = (stats.rankdata(x, axis=1) / n for x in (embedding, others))
        for i, own in enumerate(ranks):
            k, distances = c["entropy_neighbors"], np.linalg.norm(own[:, None] - own, axis=-1)
            with np.errstate(divide="ignore"):
                entropy[i] = -np.mean(np.log(k / (n * np.sort(distances, axis=1)[:, k] ** own.shape[1])))
            for j in range(0 if shuffle is None else i, n_layers):
                information[i, j] = np.mean(
                    [
                        mutual_info_regression(own, y, n_neighbors=c["neighbors"], random_state=c["seed"])
                        for y in others[j].T
                    ]
                )
    else:
        for i, j in itertools.product(range(n_layers), repeat=2):
            parts = embedding[i], others[j], np.hstack([embedding[i], others[j]])
            volumes = [np.linalg.slogdet(np.atleast_2d(np.cov(own.T, ddof=1)))[1] for own in parts]
            entropy[i], information[i, j] = volumes[0] / 2, (volumes[0] + volumes[1] - volumes[2]) / 2
            if np.linalg.eigvalsh(np.corrcoef(parts[2].T))[0] <= 1e-12:  # linear functions of each other
                information[i, j] = np.nan
    if shuffle is None:
        information = (information + information.T) / 2
    else:
        information = np.triu(information) + np.triu(information, 1).T
    product = np.outer(entropy, entropy)
    small = ~(np.abs(entropy) >= 0.05) | ~np.isfinite(entropy)
    values = information / np.sqrt(np.where((product > 0) & ~small & ~small[:, None], product, np.nan))
    if c["measure"] == "gaussian" and shuffle is None:
        np.fill_diagonal(values, np.where(small, np.nan, 1.0))
    return values


def linear(own, others, measure, shuffled=False):
    """Cosine or CKA of the states (L, N, d) of layers, the deeper of each pair's in `others` if these are shuffled."""
    if measure == "cosine":
        own, others = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (own, others))
        values = np.einsum("iab,jab->ij", own, others) / own.shape[1]
    else:
        centre = np.eye(own.shape[1]) - 1 / own.shape[1]
        grams = [np.stack([centre @ x @ x.T @ centre for x in side]) for side in (own, others)]
        grams = [x / np.linalg.norm(x, axis=(1, 2), keepdims=True) for x in grams]
        values = np.einsum("iab,jab->ij", *grams)
    return np.triu(values) + np.triu(values, 1).T if shuffled else values
