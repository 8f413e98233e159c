"""Benchmark ``conv``: a sparse 3x3 convolution, forward and backward, and training steps of a residual network.

Models are channels and image, such as ``64-32x32``, or a network of the CIFAR form and its width, ``resnet20-w64``.
Images are given to each implementation in the layout that it uses inside a network: ours have the batch last, and
zeros around them that the layer before has written; torch's are NCHW and channels-last, and ``torch-dense`` in the
records is the faster of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from bench_numpy import dense_arrays
from bench_steps import Key, Updater, blas_kernels, time_candidates
from bench_table import print_table
from bench_task import Record, Task
from timing import median_ms

from refimpl.layers import conv2d
from refimpl.layers.padded import Padded
from refimpl.methods.random_support import exact_support
from refimpl.models.resnet import ResNet
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.weights import Grads, Params, SparseWeight, Support, Weight

LR, MOMENTUM = 1e-3, 0.9
BATCH, BATCH_OF_FEW_CHANNELS = 32, 128
LAYOUTS = ("nchw", "channels-last")
WEIGHT = "weight"


def measure(task: Task) -> list[Record]:
    """Time one layer, or one network, dense and at several sparsities."""
    if task.model.startswith("resnet"):
        depth, width = (int(part) for part in task.model.removeprefix("resnet").split("-w"))
        batch = task.batch or BATCH
        steps = network_steps(task, depth, width, batch)
        title = f"training step of ResNet-{depth} with {width} channels, batch {batch}, first and last layer dense"
        return _measure(task, task.model, title, steps, batch)
    channels, image = task.model.split("-")
    height, width = (int(part) for part in image.split("x"))
    batch = task.batch or (BATCH if int(channels) > 16 else BATCH_OF_FEW_CHANNELS)
    steps = layer_steps(task, (int(channels), height, width, batch))
    title = f"convolution 3x3 of {channels} channels, images {image}, batch {batch}, forward and backward"
    return _measure(task, task.case, title, steps, batch)


def _measure(task: Task, case: str, title: str, steps: Mapping[Key, Callable[[], object]], batch: int) -> list[Record]:
    samples = time_candidates(task, steps)
    median = {key: median_ms(taken) for key, taken in samples.items()}
    peers = [layout for layout in LAYOUTS if (f"torch-{layout}", 0.0) in median]
    dense = {layout: median[f"torch-{layout}", 0.0] for layout in peers}
    faster = min(dense, key=dense.__getitem__, default="")
    rows: list[list[Any]] = []
    for (name, sparsity), ms in median.items():
        ratios = [dense[layout] / ms for layout in peers] + ([dense[faster] / ms] if peers else [])
        rows.append([name, f"{sparsity:g}", ms, *ratios])
    head = ["implementation", "sparsity", "ms", *(f"{layout} /" for layout in peers), *(["faster /"] if peers else [])]
    print_table(f"{title}, {task.setting}, BLAS kernels {blas_kernels()}", head, rows)
    setting: dict[str, Any] = {"batch": batch, "blas": blas_kernels()}
    records = [task.record(*key, median[key], len(samples[key]), **setting) for key in steps]
    if faster:
        import bench_torch

        count = len(samples[f"torch-{faster}", 0.0])
        name = bench_torch.name_of(task.allocator)
        records.append(task.record(name, 0.0, dense[faster], count, layout=faster, **setting))
    return [{**record, "case": case} for record in records]


def padded(x: np.ndarray) -> Padded:
    """Return images with a margin of one pixel, as the layers of a network hand them on."""
    out = Padded.empty(x.shape, x.dtype, 1)
    out.image[...] = x
    return out


def layer_steps(task: Task, shape: tuple[int, int, int, int]) -> dict[Key, Callable[[], object]]:
    """Return everything that is timed of one layer, of as many output as input channels."""
    rng = generator(0, "bench")
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    w = rng.standard_normal((shape[0], shape[0], 3, 3)).astype(np.float32)
    steps: dict[Key, Callable[[], object]] = {}
    if "torch" in task.peers:
        import bench_torch_conv

        for layout in LAYOUTS:
            steps[f"torch-{layout}", 0.0] = bench_torch_conv.ConvStep(w, x, dy, layout)
    steps["refimpl-dense", 0.0] = ConvStep(w, x, dy)
    for sparsity in task.sparsity:
        nnz = max(1, round((1 - sparsity) * w.size))
        support = exact_support(w.shape, nnz, generator(0, f"support/{sparsity}"))
        steps["refimpl", sparsity] = ConvStep(SparseWeight.from_dense(w, support), x, dy)
    return steps


class ConvStep:
    """Our forward and backward of one convolution: the images' gradient, and the weight's on its support."""

    def __init__(self, w: Weight, x: np.ndarray, dy: np.ndarray) -> None:
        self.params: Params = {WEIGHT: w}
        self.x, self.dy = padded(x), padded(dy)

    def __call__(self) -> tuple[np.ndarray, Any, np.ndarray]:
        """Compute, and return the output and the gradients of images and weight."""
        w = self.params[WEIGHT]
        grads: Grads = {}
        y, cache = conv2d.forward(self.params, WEIGHT, None, self.x, padding=1)
        dx = conv2d.backward(self.dy, cache, grads)
        gradient = grads[WEIGHT]
        assert not isinstance(gradient, np.ndarray)
        return y, dx, gradient.on(w.support) if isinstance(w, SparseWeight) else gradient.dense()


def network_steps(task: Task, depth: int, width: int, batch: int) -> dict[Key, Callable[[], object]]:
    """Return the training steps of a residual network."""
    model = ResNet(depth, width=width)
    rng = generator(0, "bench")
    x = rng.standard_normal((*model.input_shape, batch)).astype(np.float32)
    labels = rng.integers(model.classes, size=batch)
    steps: dict[Key, Callable[[], object]] = {}
    if "torch" in task.peers:
        import bench_torch_conv

        whole = {**dense_arrays(model.init(0, np.float32)), **model.buffers(np.float32)}
        for layout in LAYOUTS:
            steps[f"torch-{layout}", 0.0] = bench_torch_conv.ResNetStep(
                depth, width, whole, x, labels, LR, MOMENTUM, layout
            )
    steps["refimpl-dense", 0.0] = NetworkStep(model, model.init(0, np.float32), x, labels)
    for sparsity in task.sparsity:
        params = model.init(0, np.float32, supports_of(model, 1 - sparsity))
        steps["refimpl", sparsity] = NetworkStep(model, params, x, labels)
    return steps


def supports_of(model: ResNet, density: float) -> dict[str, Support]:
    """Draw supports of one density for all convolutions but the first."""
    sparse = [spec for spec in model.specs().values() if spec.prunable and spec.name.startswith("layer")]
    return {
        spec.name: exact_support(spec.shape, max(1, round(density * spec.size)), generator(0, f"support/{spec.name}"))
        for spec in sparse
    }


class NetworkStep:
    """Our training step of a network with buffers: cross-entropy, SGD with momentum."""

    def __init__(
        self, model: ResNet, params: Params, x: np.ndarray, labels: np.ndarray, lr: float = LR,
        momentum: float = MOMENTUM,
    ) -> None:  # fmt: skip
        self.model, self.params, self.x, self.labels = model, params, x, labels
        self.buffers = model.buffers(x.dtype)
        self.update = Updater(params, SGD(momentum), lr)

    def __call__(self) -> float:
        """Take one step and return the loss before it."""
        loss, grads, self.buffers = self.model.loss_and_grads({**self.params, **self.buffers}, self.x, self.labels)
        self.update(grads)
        return loss
