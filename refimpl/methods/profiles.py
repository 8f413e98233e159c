"""Profiles: named sets of conventions that do what other systems do.

Each was re-derived from a reading of the system's source, of the state named in :data:`ABOUT`; with it the functions of
:mod:`refimpl.methods.onestep` give the mask, values and optimizer state that the system gives, from the same arrays
and draws, in the same precision. A system's defect is reproduced, and named under ``defects``.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from refimpl.methods.conventions import DEFAULT, Conventions

STEPS = ("initial", "allocate", "rigl", "set", "snfs", "prune", "gmp", "schedule")
"""What a system may have: an initial random mask, an allocation rule, three kinds of exchange, pruning to a sparsity,
a schedule of sparsity, and a schedule of exchanges."""


@dataclass(frozen=True)
class About:
    """Where a profile comes from.

    Attributes
    ----------
    system : str
        What it reproduces, with the version or files that were read.
    steps : tuple of str
        What that system has, of :data:`STEPS`.
    defects : tuple of str
        What it does against its own intent; reproduced.
    notes : tuple of str
        What the fields cannot say.
    """

    system: str
    steps: tuple[str, ...]
    defects: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


PROFILES: dict[str, Conventions] = {
    "default": DEFAULT,
    "rigl-tf": Conventions(
        initial_rounding="floor",
        initial_of="zeros",
        kept_minimum="none",
        er_zeros="floor",
        er_axes="last-two",
        conv_layout="HWIO",
        drop_width="float32",
        drop_scope="all",
        drop_noise="normal-1e-5",
        snfs_score="ema-0.9",
        inactive_values="stored",
        slot_masked="none",
        exchange_step="instead",
        exchange_counts="nothing",
        update_period="since-last",
        update_zero="if-due",
        update_end="inclusive",
        cosine_span="window",
        fraction_width="float32",
        set_criterion="magnitude",
    ),
    "rigl-torch": Conventions(
        initial_rounding="floor",
        initial_of="zeros",
        kept_minimum="none",
        first_layer="dense-if-uniform",
        linear_layers="dense",
        drop_scope="all",
        tie_order="undefined",
        growth_gradient="window-mean",
        grown_slot="stored",
        slot_masked="momentum",
        exchange_step="instead",
        cosine_past="rise",
        clip_norm="dense",
    ),
    "jaxpruner": Conventions(
        initial_width="float32-product",
        kept_minimum="one",
        er_zeros="floor",
        er_axes="last-two",
        conv_layout="HWIO",
        drop_of="kept-of-density",
        drop_rounding="half-even",
        drop_width="float32",
        growth_target="density",
        growth_ranking="raised",
        slot_masked="none",
        prune_from="all",
        global_scores="unit-norm",
        nm_ties="higher",
        gmp_progress="plus-one",
        exchange_step="instead",
        step_counter="before-step",
        update_zero="if-due",
        update_end="inclusive",
        clip_norm="dense",
        set_criterion="magnitude",
    ),
    "itop": Conventions(
        initial_count="bernoulli",
        kept_minimum="none",
        drop_rounding="ceil",
        drop_ties="threshold",
        drop_none="zeros",
        tie_order="undefined",
        signed_drop="itop",
        growth_count="bernoulli",
        growth_ranking="masked",
        momentum_masking="every-step",
        grown_slot="stored",
        slot_masked="momentum",
        gmp_progress="window-plus-one",
        exchange_step="after",
        update_end="none",
        cosine_span="run",
        cosine_past="rise",
        cosine_floor="0.005",
        cosine_form="recursive",
        clip_norm="dense",
        set_criterion="magnitude",
    ),
    "cerebras": Conventions(
        initial_rounding="floor",
        initial_width="float32",
        kept_minimum="none",
        drop_of="kept",
        drop_rounding="floor",
        drop_width="float32",
        drop_scope="all",
        tie_order="undefined",
        growth_target="initial",
        prune_from="all",
        exchange_step="after",
        update_period="from-begin",
        before_first="dense",
        cosine_past="rise",
        clip_norm="dense",
        set_criterion="magnitude",
    ),
    "sparsimony": Conventions(
        initial_rounding="floor",
        kept_minimum="none",
        initial_choice="magnitude",
        er_exhaust="one-maximum",
        er_zeros="floor",
        drop_of="kept-of-sparsity",
        drop_rounding="floor",
        drop_width="float32",
        tie_order="undefined",
        growth_target="initial",
        growth_gradient="sum-since-start",
        inactive_values="stored",
        grown_from="stored",
        grown_slot="stored",
        slot_masked="momentum-and-adam",
        prune_from="all",
        gmp_progress="over-end",
        exchange_step="after",
        update_end="inclusive",
        cosine_past="rise",
        clip_norm="dense",
        set_criterion="magnitude",
    ),
    "torch-prune": Conventions(
        initial_rounding="half-even",
        initial_of="zeros",
        kept_minimum="none",
        tie_order="undefined",
        inactive_values="stored",
        slot_masked="none",
        grown_slot="stored",
        prune_of="remaining",
        clip_norm="dense",
    ),
    "sparse-learning": Conventions(
        initial_count="bernoulli",
        kept_minimum="none",
        er_cap=False,
        er_epsilon="searched",
        drop_rounding="ceil",
        drop_none="zeros",
        tie_order="undefined",
        signed_drop="sparse-learning",
        growth_count="bernoulli",
        growth_ranking="masked",
        snfs_score="momentum-or-adam",
        grown_slot="stored",
        slot_masked="none",
        exchange_step="after",
        update_end="none",
        cosine_span="run",
        cosine_past="rise",
        cosine_floor="0.005",
        cosine_form="recursive",
        clip_norm="dense",
        set_criterion="magnitude",
    ),
    "set-original": Conventions(
        initial_count="with-replacement",
        kept_minimum="none",
        er_cap=False,
        signed_drop="set-original",
        regrow="reset",
        grown_from="normal-0.1",
    ),
    "selfish-authors": Conventions(
        initial_count="bernoulli",
        er_cap=False,
        er_epsilon="searched",
        drop_rounding="ceil",
        drop_ties="threshold",
        growth_count="bernoulli",
        growth_target="initial",
        regrow="keep",
        signed_drop="selfish-authors",
        trigger_epoch="skip",
        exchange_step="after",
        cosine_span="run",
        cosine_past="rise",
        cosine_floor="0.005",
        cosine_form="recursive",
        clip_norm="dense",
        average_first="skip",
        set_criterion="magnitude",
    ),
    "sparseml": Conventions(
        initial_rounding="half-even",
        initial_of="zeros",
        kept_minimum="none",
        initial_choice="magnitude-and-gradient",
        er_cap=False,
        drop_of="kept-of-target",
        drop_rounding="half-even",
        growth_target="initial",
        growth_gradient="extra-batches",
        grown_slot="stored",
        slot_masked="first-moments",
        slot_mask="nonzero",
        exchange_step="instead",
        update_period="from-begin",
        update_zero="if-due",
        update_end="inclusive",
        cosine_span="window",
        cosine_origin="begin",
        clip_norm="dense",
    ),
}
"""Named sets of conventions: the defaults, and what other systems do."""

ABOUT: dict[str, About] = {
    "default": About("this package", STEPS),
    "rigl-tf": About(
        "rigl (TensorFlow): sparse_optimizers.py, sparse_optimizers_base.py, sparse_utils.py",
        ("initial", "allocate", "rigl", "set", "snfs", "schedule"),
        ("the noise on the magnitudes can keep an entry that was not stored, which then holds its stale value",),
        (
            "its draws are seeded by a salted hash of a name, so they are arguments here, the noise too",
            "the exchange of RigL stands in place of a step, those of SET and SNFS come after one",
        ),
    ),
    "rigl-torch": About(
        "rigl-torch: rigl_torch/RigL.py",
        ("initial", "allocate", "rigl", "schedule"),
        ("Adam's moments are never masked, so a grown entry goes on with stale ones",),
        ("it is given the density; pass sparsity = 1 - density", "it has the uniform rule only"),
    ),
    "jaxpruner": About(
        "jaxpruner: mask_calculator.py, base_updater.py, sparsity_types.py, sparsity_schedules.py",
        ("initial", "allocate", "rigl", "set", "prune", "gmp", "schedule"),
        ("scores of 256 and more absorb the 1e-5 by which kept entries are raised in float32",),
        (),
    ),
    "itop": About(
        "In-Time-Over-Parameterization: sparselearning/core.py",
        ("initial", "allocate", "rigl", "set", "snfs", "prune", "gmp", "schedule"),
        (
            "momentum masked at every step leaves growth by momentum nothing but what was just dropped",
            "growth by gradient falls short when fewer free places have a gradient than are wanted",
            "its signed criterion keeps the most negative weights only",
            "Adam's moments are never masked",
        ),
    ),
    "cerebras": About(
        "cerebras_pytorch 2.10 (cstorch): sparse/utils.py, dynamic.py, base.py, set.py, rigl.py, gmp.py, init.py",
        ("initial", "rigl", "set", "prune", "gmp", "schedule"),
        ("everything is trained densely until the first update, if step 0 is none",),
        ("its cosine has its own form, which is this one with half its period as the end",),
    ),
    "sparsimony": About(
        "sparsimony: dst/, mask_calculators/, schedulers/base.py, distributions/base.py",
        ("initial", "allocate", "rigl", "set", "prune", "gmp", "schedule"),
        (
            "the initial value of grown weights is ignored: each goes on from its stale stored value",
            "the first exchange grows by the sum of the gradients of all steps since the start",
        ),
        ("it raises an error where more entries are left by the drop than the target holds; here none grow",),
    ),
    "torch-prune": About(
        "torch 2.13: nn/utils/prune.py",
        ("prune",),
        (),
        ("random pruning takes the entries of the largest draws: pass scores = -draws",),
    ),
    "sparse-learning": About(
        "sparse_learning: sparselearning/core.py, funcs.py",
        ("initial", "allocate", "rigl", "set", "snfs", "schedule"),
        (
            "the density of a tensor has no cap: the model is smaller than asked",
            "growth ranks active entries with score 0 and can fall on them",
            "its signed criterion leaves nothing but half of the count it was to remove, all negative",
        ),
        ("how many entries each tensor grows is an outcome of all tensors: pass it as want",),
    ),
    "set-original": About(
        "SET's authors' program: set_mlp_sparse_data_structures.py (the SciPy version)",
        ("initial", "set", "schedule"),
        ("draws with replacement store fewer entries than asked", "at least one entry is always dropped"),
        ("no exchange after the last epoch", "weight decay is not multiplied by the learning rate"),
    ),
    "selfish-authors": About(
        "Selfish-RNN's authors' program: sparse_rnn_core.py, main.py",
        ("initial", "allocate", "set", "rigl", "schedule"),
        ("its signed criterion drops the most negative weights instead of the least",),
        ("its own exchange is SET's with magnitudes",),
    ),
    "sparseml": About(
        "sparseml: pytorch/sparsification/pruning/modifier_pruning_rigl.py, mask_creator.py",
        ("initial", "allocate", "rigl", "gmp", "prune", "schedule"),
        (
            "Adam's second moment is never reset",
            "state of a stored zero is wiped before every step",
            "what clipped densities cannot hold is lost",
        ),
        ("ties at the threshold of its mask are settled in row-major order; where the threshold is 0, by a shuffle",),
    ),
}
"""Where each profile comes from, by name."""


def profile(name: str) -> Conventions:
    """Return the conventions of a named profile.

    Raises
    ------
    ValueError
        If there is no such profile; the message lists those there are and names the nearest.
    """
    if name in PROFILES:
        return PROFILES[name]
    near = get_close_matches(name, PROFILES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no profile {name!r}; {hint}there are {', '.join(PROFILES)}")
