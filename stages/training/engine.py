"""The DeepSpeed engine: process group, precision, ZeRO partitioning, optimiser.

Deliberate choices, each against a default that costs something:

* nothing is compiled at run time (minutes on a CPU): the optimiser is torch's AdamW, passed in, not one that
  DeepSpeed's config names;
* buckets are no larger than the model: the defaults reserve gigabytes for the smallest one;
* the caller says which micro-batch is the last of a step, so a step may have any number of them;
* bfloat16 gradients are summed over micro-batches in float32.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ropewalk.stages.training.loss import WeightedLoss
    from ropewalk.stages.training.train import TrainConfig

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own bucket size, an upper bound here."""


@contextmanager
def process_group(rank: int, world_size: int) -> Iterator[torch.device]:
    """Join the gang's process group, or use the one that is there; yields this rank's device.

    Must be entered before DeepSpeed is imported: it picks its accelerator at import.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # Sums in a fixed order, so that a resumed run gives the bits of an undisturbed one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Ranks share the cores; spinning threads of several ranks cost more than they give.
        torch.set_num_threads(1)
    _quiet()
    ours = not dist.is_initialized()
    if ours:
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    import deepspeed

    # DeepSpeed would compile a shared-memory reduction at start-up, a minute of work; only its inference uses it.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield device
    finally:
        if ours:
            dist.destroy_process_group()


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # DeepSpeed calls collectives by names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def zero_settings(config: TrainConfig, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed config. `num_parameters` bounds the communication buckets."""
    bucket = min(BUCKET_ELEMENTS, max(1, num_parameters))
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket, "overlap_comm": False}
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": min(50_000_000, bucket), "sub_group_size": 10**9}
    else:
        zero |= {"allgather_bucket_size": bucket}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.dtype == "bfloat16":
        settings |= {"bf16": {"enabled": True}}
        if config.zero_stage > 0:
            settings |= {"data_types": {"grad_accum_dtype": "fp32"}}
    return settings


@contextmanager
def partitioned_loading(config: TrainConfig) -> Iterator[None]:
    """While open, transformers gives each rank only its share of a checkpoint, if ZeRO stage 3 is asked for."""
    if config.zero_stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers holds it weakly: it must live as long as the loading does.
    active = HfDeepSpeedConfig(zero_settings(config, BUCKET_ELEMENTS))
    yield
    del active


def build_engine(module: WeightedLoss, config: TrainConfig) -> Any:
    """The DeepSpeed engine for a model whose forward pass ends in the loss."""
    import deepspeed
    import torch

    optimizer = torch.optim.AdamW(
        parameter_groups(module, config.weight_decay), lr=config.learning_rate, betas=config.adam_betas
    )
    if config.zero_stage == 3:
        # The loss reads it outside of the module that owns it.
        deepspeed.zero.register_external_parameter(module, module.model.get_output_embeddings().weight)
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()]
    # Its reports of memory in use are no part of a command's answer.
    with redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=zero_settings(config, sum(sizes)), dist_init_required=False
        )
    return engine


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for norms and biases."""
    matrices, vectors = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(engine: Any) -> float | None:
    """The norm of the reduced gradients where DeepSpeed does not report it: stage 0 in float32, before the step."""
    import torch

    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def gathered_weights(engine: Any, rank: int) -> Mapping[str, Any] | None:
    """The whole model's state on the CPU of rank 0; None on the others. All ranks must call it."""
    import deepspeed

    model = engine.module.model
    if engine.zero_optimization_stage() < 3:
        return {name: value.detach().cpu() for name, value in model.state_dict().items()} if rank == 0 else None
    weights: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value.detach().cpu() for name, value in model.state_dict().items() if name not in tied}
    return weights | buffers if rank == 0 else None
