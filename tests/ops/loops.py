"""The operators written once more, as loops over single boxes and numbers."""

import math

import numpy as np

F = np.float32


def area(box):
    return F(box[2] - box[0]) * F(box[3] - box[1]) if box[2] >= box[0] and box[3] >= box[1] else F(0)


def iou(a, b):
    """Rounded to float32 after every operation."""
    width, height = F(min(a[2], b[2]) - max(a[0], b[0])), F(min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height if width > 0 and height > 0 else F(0)
    union = area(a) + area(b) - common
    return common / union if union > 0 else F(0)


def order(scores, valid):
    return sorted((i for i in range(len(scores)) if valid[i]), key=lambda i: (-scores[i], i))


def nms(boxes, scores, valid, threshold, labels=None):
    kept = []
    for i in order(scores, valid):
        rivals = [j for j in kept if labels is None or labels[i] == labels[j]]
        if all(float(iou(boxes[i], boxes[j])) <= threshold for j in rivals):
            kept.append(i)
    return kept


def soft_nms(boxes, scores, valid, *, count, method, iou_threshold, sigma, score_threshold, labels):
    left = {i: float(scores[i]) for i in range(len(scores)) if valid[i] and scores[i] >= F(score_threshold)}
    found = []
    while left and len(found) < count:
        best = max(left, key=lambda i: (left[i], -i))
        found.append((best, left.pop(best)))
        for i in list(left):
            if labels is not None and labels[i] != labels[best]:
                continue
            overlap = float(iou(boxes[i], boxes[best]))
            if method == "linear":
                left[i] *= 1 - overlap if overlap >= iou_threshold else 1
            else:
                left[i] *= math.exp(-(overlap**2) / sigma)
            if left[i] < score_threshold:
                del left[i]
    return found


def roi_align(features, roi, output_size, spatial_scale, sampling_ratio, aligned):
    """Returns [h, w, C] and the weight of every pixel, [h, w, H, W]. Without a ratio, it depends on the roi."""
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    height, width, _ = features.shape
    x1, y1, x2, y2 = (float(v) * spatial_scale - 0.5 * aligned for v in roi)
    tall, wide = y2 - y1, x2 - x1
    if not aligned:
        tall, wide = max(tall, 1.0), max(wide, 1.0)
    weights = np.zeros((rows, columns, height, width))
    down, across = (sampling_ratio or math.ceil(side) for side in (tall / rows, wide / columns))
    for i, j, a, b in np.ndindex(rows, columns, down, across):
        y = y1 + (i + (a + 0.5) / down) * tall / rows
        x = x1 + (j + (b + 0.5) / across) * wide / columns
        if not (-1 <= y <= height and -1 <= x <= width):
            continue
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        for v, u in np.ndindex(height, width):
            weights[i, j, v, u] += max(0, 1 - abs(y - v)) * max(0, 1 - abs(x - u)) / (down * across)
    return np.einsum("ijvu,vuc->ijc", weights, features), weights


def paste_mask(mask, box, size):
    """Returns [H, W]: reads the padded mask at every pixel of the enlarged box."""
    padded = np.pad(mask, 1)
    corners = []
    for axis in (1, 0):
        low, high = float(box[axis]), float(box[axis + 2])
        center, half = (low + high) / 2, (high - low) / 2 * padded.shape[1 - axis] / mask.shape[1 - axis]
        corners.append((math.trunc(center - half), math.trunc(center + half)))
    (top, bottom), (left, right) = corners
    result = np.zeros(size)
    for y, x in np.ndindex(*size):
        if top <= y <= bottom and left <= x <= right:
            at = []
            for place, first, last, count in ((y, top, bottom, len(padded)), (x, left, right, len(padded[0]))):
                source = max(0, (place - first + 0.5) * count / (last - first + 1) - 0.5)
                at.append((int(source), min(int(source) + 1, count - 1), source - int(source)))
            (a, b, v), (c, d, u) = at
            upper, lower = ((1 - u) * padded[row, c] + u * padded[row, d] for row in (a, b))
            result[y, x] = (1 - v) * upper + v * lower
    return result


def roi_max_pool(features, roi, output_size, spatial_scale):
    """Returns [h, w, C] and the pixel of every maximum, [h, w, C, 2], or None for an empty bin."""
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    height, width, channels = features.shape
    half_away = lambda v: int(math.copysign(math.floor(abs(v) + 0.5), v))
    x1, y1, x2, y2 = (half_away(float(F(v) * F(spatial_scale))) for v in roi)
    step_y, step_x = F(max(y2 - y1 + 1, 1)) / F(rows), F(max(x2 - x1 + 1, 1)) / F(columns)
    values, places = np.zeros((rows, columns, channels), F), {}
    for i, j, c in np.ndindex(rows, columns, channels):
        ys = range(max(0, math.floor(F(i) * step_y) + y1), min(height, math.ceil(F(i + 1) * step_y) + y1))
        xs = range(max(0, math.floor(F(j) * step_x) + x1), min(width, math.ceil(F(j + 1) * step_x) + x1))
        pixels = [(y, x) for y in ys for x in xs]
        if pixels:
            best = max(pixels, key=lambda at: (features[at][c], -at[0], -at[1]))
            values[i, j, c], places[i, j, c] = features[best][c], best
    return values, places


def match(overlaps, valid, low, high, allow_low_quality):
    objects = [m for m in range(len(valid)) if valid[m]]
    matched, label = [], []
    for a in range(overlaps.shape[1]):
        best = max(objects, key=lambda m: (overlaps[m, a], -m), default=None)
        value = -1 if best is None else overlaps[best, a]
        kind = 1 if value >= F(high) else 0 if value < F(low) else -1
        if allow_low_quality and any(overlaps[m, a] == overlaps[m].max() > 0 for m in objects):
            kind = 1
        matched.append(0 if best is None else best)
        label.append(kind)
    return matched, label


def select(boxes, scores, valid, score_threshold, iou_threshold, count):
    """The post-processing of torchvision's Faster R-CNN for one image: `boxes [A, K, 4]`, `scores [A, K]`."""
    places, classes = np.nonzero((scores > F(score_threshold)) & valid[:, None])
    some = np.array([min(b[2] - b[0], b[3] - b[1]) >= F(0.01) for b in boxes[places, classes]], bool)
    places, classes = places[some], classes[some]
    b, s = boxes[places, classes], scores[places, classes]
    kept = nms(b, s, np.ones(len(s), bool), iou_threshold, classes)[:count]
    return b[kept], s[kept], classes[kept]
