"""darknet in plain NumPy loops over arrays [C, H, W], independent of the package: layers and whole networks."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


ACTIVATE = {
    "linear": lambda x: x,
    "leaky": lambda x: np.where(x > 0, x, 0.1 * x),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "logistic": sigmoid,
    "loggy": lambda x: 2 / (1 + np.exp(-x)) - 1,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "swish": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "elu": lambda x: np.where(x >= 0, x, np.exp(x) - 1),
    "selu": lambda x: np.where(x >= 0, 1.0507 * x, 1.0507 * 1.6732 * (np.exp(x) - 1)),
    "relie": lambda x: np.where(x > 0, x, 0.01 * x),
    "ramp": lambda x: x * (x > 0) + 0.1 * x,
    "hardtan": lambda x: np.clip(x, -1, 1),
}


def reorg_loop(x, stride):
    c, h, w = x.shape
    out_c = c // (stride * stride)
    memory, result = x.ravel(), np.zeros(x.size, x.dtype)
    for k in range(c):
        for j in range(h):
            for i in range(w):
                c2, offset = k % out_c, k // out_c
                w2, h2 = i * stride + offset % stride, j * stride + offset // stride
                result[i + w * (j + h * k)] = memory[w2 + w * stride * (h2 + h * stride * c2)]
    return result.reshape(c * stride * stride, h // stride, w // stride)


def max_pool_loop(x, size, stride, padding=None):
    padding = size - 1 if padding is None else padding
    c, h, w = x.shape
    out_h, out_w = (h + padding - size) // stride + 1, (w + padding - size) // stride + 1
    result = np.full((c, out_h, out_w), -np.inf, x.dtype)
    for i in range(out_h):
        for j in range(out_w):
            for n in range(size):
                for m in range(size):
                    row, column = i * stride + n - padding // 2, j * stride + m - padding // 2
                    if 0 <= row < h and 0 <= column < w:
                        result[:, i, j] = np.maximum(result[:, i, j], x[:, row, column])
    return result


def local_loop(x, kernel, bias, stride, pad):
    """The kernel is [H', W', F, C, size, size], the bias [F, H', W']."""
    size, result = kernel.shape[-1], np.array(bias, np.float64)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    for i in range(result.shape[1]):
        for j in range(result.shape[2]):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            result[:, i, j] += (kernel[i, j] * window[None]).sum((1, 2, 3))
    return result


def convolution_loop(x, kernel, stride, pad, groups, dilation=1):
    """The kernel is [F, C / groups, size, size]."""
    features, depth, size, _ = kernel.shape
    pad, reach = pad * dilation, (size - 1) * dilation + 1
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    out_h, out_w = ((extent - reach) // stride + 1 for extent in padded.shape[1:])
    result = np.zeros((features, out_h, out_w))
    for f in range(features):
        first = f // (features // groups) * depth
        for i in range(out_h):
            for j in range(out_w):
                rows = slice(i * stride, i * stride + reach, dilation)
                columns = slice(j * stride, j * stride + reach, dilation)
                result[f, i, j] = (padded[first : first + depth, rows, columns] * kernel[f]).sum()
    return result


def shortcut_loop(x, other, alpha, beta):
    c, h, w = x.shape
    result = x.copy()
    step, sample = max(other.shape[1] // h, 1), max(h // other.shape[1], 1)
    for k in range(min(c, other.shape[0])):
        for j in range(min(h, other.shape[1])):
            for i in range(min(w, other.shape[2])):
                at = (k, j * sample, i * sample)
                result[at] = alpha * x[at] + beta * other[k, j * step, i * step]
    return result


def run_loops(sections, values, x, epsilon):
    """Runs a network.

    Args:
        sections: (kind, options) of each layer, options as numbers, strings and lists.
        values: The values of a weights file.
        x: [C, H, W].
        epsilon: Added to the variance.

    Returns:
        The outputs of all layers, and the number of values that were read.
    """
    position, outputs = 0, []

    def take(*shape):
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return values[position - count : position].reshape(shape).astype(np.float64)

    def normalize(y, shift, scale, mean, var):
        one = (-1,) + (1,) * (y.ndim - 1)
        y = (y - mean.reshape(one)) / np.sqrt(var.reshape(one) + epsilon)
        return y * scale.reshape(one) + shift.reshape(one)

    for kind, o in sections:
        here = len(outputs)
        if kind == "convolutional":
            n, size, groups = o["filters"], o.get("size", 1), o.get("groups", 1)
            pad = size // 2 if o.get("pad") else o.get("padding", 0)
            shift = take(n)
            norm = [take(n) for _ in range(3)] if o.get("batch_normalize") else None
            kernel = take(n, x.shape[0] // groups, size, size)
            x = convolution_loop(x, kernel, o.get("stride", 1), pad, groups, o.get("dilation", 1))
            x = normalize(x, shift, *norm) if norm else x + shift[:, None, None]
        elif kind == "connected":
            shift, kernel = take(o["output"]), take(o["output"], x.size)
            x = kernel @ x.ravel()
            x = normalize(x, shift, *(take(o["output"]) for _ in range(3))) if o.get("batch_normalize") else x + shift
        elif kind == "local":
            stride, pad, size = o.get("stride", 1), o.get("pad", 0), o["size"]
            h, w = ((extent + 2 * pad - size) // stride + 1 for extent in x.shape[1:])
            bias = take(o["filters"], h, w)
            x = local_loop(x, take(h, w, o["filters"], x.shape[0], size, size), bias, stride, pad)
        elif kind == "maxpool":
            x = max_pool_loop(x, o.get("size", o.get("stride", 1)), o.get("stride", 1), o.get("padding"))
        elif kind == "avgpool":
            x = x.mean((1, 2), keepdims=True)
        elif kind == "route":
            parts = [outputs[i if i >= 0 else here + i] for i in o["layers"]]
            groups, group = o.get("groups", 1), o.get("group_id", 0)
            x = np.concatenate([np.split(part, groups)[group] for part in parts])
        elif kind == "shortcut":
            for i in o["from"]:
                x = shortcut_loop(x, outputs[i if i >= 0 else here + i], o.get("alpha", 1), o.get("beta", 1))
        elif kind == "upsample":
            x = o.get("scale", 1) * x.repeat(o["stride"], 1).repeat(o["stride"], 2)
        elif kind == "reorg":
            x = reorg_loop(x, o["stride"])
        default = "logistic" if kind in ("convolutional", "connected", "local") else "linear"
        x = ACTIVATE[o.get("activation", default)](x)
        outputs.append(x)
    return outputs, position


def text_of(sections, height, width, channels=3):
    """Writes a cfg file."""
    lines = ["[net]", f"height={height}", f"width={width}", f"channels={channels}"]
    for kind, options in sections:
        lines += ["", f"[{kind}]"]
        for key, value in options.items():
            lines.append(f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return "\n".join(lines) + "\n"


def iou_loop(a, b):
    """The IoU of two boxes (x, y, w, h), as darknet computes it."""
    left, right = max(a[0] - a[2] / 2, b[0] - b[2] / 2), min(a[0] + a[2] / 2, b[0] + b[2] / 2)
    top, bottom = max(a[1] - a[3] / 2, b[1] - b[3] / 2), min(a[1] + a[3] / 2, b[1] + b[3] / 2)
    shared = (right - left) * (bottom - top) if right > left and bottom > top else 0.0
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
