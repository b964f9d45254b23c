"""The loss by definition: plain Python loops over float64 arrays of one image, no PyTorch.

Maps are ``(C, H, W)``; every function does one line of docs/math.md, slowly.
"""

from __future__ import annotations

import math

import numpy as np


def pixels(h, w):
    return [(i, j) for i in range(h) for j in range(w)]


def activate(x, activation, temperature=1.0):
    y = np.zeros(x.shape)
    for i, j in pixels(*x.shape[1:]):
        z = [float(v) / temperature for v in x[:, i, j]]
        if activation == "softmax":
            total = sum(math.exp(v) for v in z)
            z = [math.exp(v) / total for v in z]
        elif activation == "sigmoid":
            z = [1 / (1 + math.exp(-v)) for v in z]
        y[:, i, j] = z
    return y


def conv(x, w, bias=None, stride=1):
    """Zero padding ``K // 2``; the kernel is not flipped."""
    (_, h, wd), (out, _, k, _) = x.shape, w.shape
    y = np.zeros((out, -(-h // stride), -(-wd // stride)))
    for o in range(out):
        for i, j in pixels(*y.shape[1:]):
            total = 0.0 if bias is None else float(bias[o])
            for p, q in pixels(k, k):
                row, col = stride * i + p - k // 2, stride * j + q - k // 2
                if 0 <= row < h and 0 <= col < wd:
                    total += sum(
                        float(a) * float(b)
                        for a, b in zip(w[o, :, p, q], x[:, row, col], strict=True)
                    )
            y[o, i, j] = total
    return y


def relu(x):
    return np.where(x > 0, x, 0.0)


def pool(x, kind):
    y = np.zeros((x.shape[0], x.shape[1] // 2, x.shape[2] // 2))
    for c in range(len(x)):
        for i, j in pixels(*y.shape[1:]):
            window = [float(x[c, 2 * i + p, 2 * j + q]) for p, q in pixels(2, 2)]
            y[c, i, j] = max(window) if kind == "maxpool" else sum(window) / 4
    return y


def features(y, net):
    """Every layer's output by name."""
    weights = {name: w.double().numpy() for name, w in net.weights.items()}
    outputs = {}
    for layer in net.layers:
        if layer.kind == "conv":
            y = conv(y, weights[layer.name], weights.get(f"{layer.name}.bias"))
        elif layer.kind == "down":
            y = relu(conv(y, weights[layer.name], stride=2))
        else:
            y = relu(y) if layer.kind == "relu" else pool(y, layer.kind)
        outputs[layer.name] = y
    return outputs


def distance(a, b):
    """Eq. (1) at one level."""
    return sum((float(u) - float(v)) ** 2 for u, v in zip(a.flat, b.flat, strict=True)) / a.size


def gram(e):
    g = np.zeros((len(e), len(e)))
    for c in range(len(e)):
        for d in range(len(e)):
            total = sum(float(e[c, i, j] * e[d, i, j]) for i, j in pixels(*e.shape[1:]))
            g[c, d] = total / e.size
    return g


def total_variation(y, valid):
    c, h, w = y.shape
    rows = cols = 0.0
    for k in range(c):
        for i, j in pixels(h, w):
            if i + 1 < h and valid[i, j] and valid[i + 1, j]:
                rows += (y[k, i + 1, j] - y[k, i, j]) ** 2
            if j + 1 < w and valid[i, j] and valid[i, j + 1]:
                cols += (y[k, i, j + 1] - y[k, i, j]) ** 2
    return rows / (c * (h - 1) * w) + cols / (c * h * (w - 1))


def topk(values, indices, rest, channels):
    y = np.zeros((channels, *values.shape[1:]))
    for i, j in pixels(*values.shape[1:]):
        listed = [int(k) for k in indices[:, i, j]]
        total = sum(float(v) for v in values[:, i, j])
        for k, v in zip(listed, values[:, i, j], strict=True):
            if rest != "renormalize":
                y[k, i, j] += float(v)
            elif total > 0:
                y[k, i, j] += float(v) / total
        others = [k for k in range(channels) if k not in listed]
        for k in others if rest == "uniform" else []:
            y[k, i, j] = (1 - total) / len(others)
    return y


def resize(x, size):
    """Bilinear, ``align_corners=False``: pixel centres at half-integers, clamped at the border."""
    y = np.zeros((len(x), *size))
    for i, j in pixels(*size):
        row = max((i + 0.5) * x.shape[1] / size[0] - 0.5, 0)
        col = max((j + 0.5) * x.shape[2] / size[1] - 0.5, 0)
        i0, j0 = int(row), int(col)
        i1, j1 = min(i0 + 1, x.shape[1] - 1), min(j0 + 1, x.shape[2] - 1)
        a, b = row - i0, col - j0
        top = (1 - b) * x[:, i0, j0] + b * x[:, i0, j1]
        low = (1 - b) * x[:, i1, j0] + b * x[:, i1, j1]
        y[:, i, j] = (1 - a) * top + a * low
    return y
