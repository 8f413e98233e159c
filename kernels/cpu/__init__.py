"""Kernels for CPUs, compiled by Numba: the same functions as :mod:`refimpl.kernels.spec`, each tested against it."""

from refimpl.kernels.cpu.activations import relu, relu_backward
from refimpl.kernels.cpu.embedding import embed, embed_gradient
from refimpl.kernels.cpu.lstm import lstm_backward, lstm_forward
from refimpl.kernels.cpu.optimizers import adam_step, sgd_step, squared_norm
from refimpl.kernels.cpu.panels import pack as to_panels
from refimpl.kernels.cpu.panels import unpack as from_panels
from refimpl.kernels.cpu.products import matmul, matmul_t, matmul_t_sddmm, sddmm, sum_rows
from refimpl.kernels.cpu.softmax import softmax_cross_entropy

__all__ = [
    "adam_step",
    "embed",
    "embed_gradient",
    "from_panels",
    "lstm_backward",
    "lstm_forward",
    "matmul",
    "matmul_t",
    "matmul_t_sddmm",
    "relu",
    "relu_backward",
    "sddmm",
    "sgd_step",
    "softmax_cross_entropy",
    "squared_norm",
    "sum_rows",
    "to_panels",
]
