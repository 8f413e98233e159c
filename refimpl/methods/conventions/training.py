"""Choices about time, and those that the optimizer's side reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refimpl.methods.conventions.rounding import Width


@dataclass(frozen=True)
class TimingConventions:
    """When an exchange happens relative to the rest of training, and how large it is.

    Attributes
    ----------
    trigger_epoch : {"skip", "exchange"}
        Whether connections are exchanged at the end of the epoch in which averaging starts. *Skip*: the
        average then begins from a network that has just been evaluated.
    exchange_step : {"instead", "after"}
        For growth by gradient. *Instead*: the batch's gradient decides the growth, and no optimizer step is
        taken with it (Algorithm 1 of RigL); the batch still counts as a training step. *After*: the optimizer
        takes its step first, and growth uses the gradient from before it. Instead is the default, for the
        gradient then belongs to the weights on which it decides.
    exchange_counts : {"step", "nothing"}
        Whether the batch of an exchange that stands in place of a step advances the counter of steps. *Step*: the
        period is then ΔT batches, and not one more.
    step_counter : {"after-step", "before-step"}
        Whether the number of a step that the schedules are asked with counts this step, or the first is 0. *After*.
    update_period : {"multiples", "from-begin", "since-last"}
        When exchanges are due: t mod ΔT = 0; (t − begin) mod ΔT = 0; or ΔT after the last, the first at the begin.
        *Multiples*: no memory, and the same steps wherever the window begins.
    update_zero : {"never", "if-due"}
        Whether an exchange may be due at step 0, before anything was learnt. *Never*.
    update_end : {"exclusive", "inclusive", "none"}
        Whether an exchange may be due at the end step: no, yes, or there is no end. *Exclusive*: where a cosine ends
        its fraction is 0.
    before_first : {"sparse", "dense"}
        Whether the support holds from the beginning, or everything is trained until the first exchange. *Sparse*.
    cosine_span : {"end", "window", "run"}
        The length over which the drop fraction falls by half a cosine: the end step, end − begin, or all steps of
        training. *End*, T_end in RigL.
    cosine_origin : {"zero", "begin"}
        Whether its time counts from step 0 or from the begin of the window. *Zero*.
    cosine_past : {"hold", "rise"}
        After that length: stay at the floor, or follow the formula up again. *Hold*.
    cosine_floor : {"0", "0.005"}
        What it falls to. *0*, the formula as published; several programs have 0.005.
    cosine_form : {"closed", "recursive"}
        Whether it is evaluated as written, or from its last value as ``torch.optim.lr_scheduler`` does, which differs
        by rounding that can move a count by one. *Closed*.
    fraction_width : {"float64", "float32"}
        Precision of the drop fraction. *Float64*.
    """

    trigger_epoch: Literal["skip", "exchange"] = "skip"
    exchange_step: Literal["instead", "after"] = "instead"
    exchange_counts: Literal["step", "nothing"] = "step"
    step_counter: Literal["after-step", "before-step"] = "after-step"
    update_period: Literal["multiples", "from-begin", "since-last"] = "multiples"
    update_zero: Literal["never", "if-due"] = "never"
    update_end: Literal["exclusive", "inclusive", "none"] = "exclusive"
    before_first: Literal["sparse", "dense"] = "sparse"
    cosine_span: Literal["end", "window", "run"] = "end"
    cosine_origin: Literal["zero", "begin"] = "zero"
    cosine_past: Literal["hold", "rise"] = "hold"
    cosine_floor: Literal["0", "0.005"] = "0"
    cosine_form: Literal["closed", "recursive"] = "closed"
    fraction_width: Width = "float64"


@dataclass(frozen=True)
class OptimizerConventions:
    """Choices that the optimizer side reads.

    Attributes
    ----------
    clip_norm : {"support", "dense"}
        The gradient norm that clipping compares with its limit: over the entries that are trained, or over
        all entries of every weight as an implementation with masks computes it. *Support*: what is not stored
        is not there, and the limit means the same at every sparsity. *Dense* needs the norm of the full
        gradients.
    average_first : {"skip", "include"}
        Whether the average of a weight counts the first iterate after its (re)start. *Skip*: then SNT-ASGD on
        a full support is ``torch.optim.ASGD`` with ``t0=0``, bit for bit. *Include* is the plain mean of all
        iterates.
    adam_eps : {"corrected", "uncorrected"}
        Whether Adam's ε is added to the root of the second moment after that was corrected for its bias, as in the
        paper's Algorithm 1, or before, as in the reordering of its section 2. *Corrected*; in a first step with
        gradients as small as ε the other moves 16 times less.
    gate_order : {"ifgo", "iofg", "igfo"}
        Order of the gates in the rows of a system's LSTM, g being the cell's candidate; what an import would permute.
        *ifgo*, the order of PyTorch and of this package.
    """

    clip_norm: Literal["support", "dense"] = "support"
    average_first: Literal["skip", "include"] = "skip"
    adam_eps: Literal["corrected", "uncorrected"] = "corrected"
    gate_order: Literal["ifgo", "iofg", "igfo"] = "ifgo"
