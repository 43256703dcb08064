"""Which modules of a head are patched, and how they get their class and lose it again.

PEFT is imported only when a head comes from it.
"""

import functools

from torch import nn

from .head import FusedHead, FusedLinear, FusedLoss


def fuse_head(head: nn.Module | None, state: FusedLoss, model_name: str) -> None:
    """Make `head`, or what PEFT wrapped around it, carry `state`.

    Raises:
        ValueError: its kind is not supported; nothing was changed.
    """
    for part, fused_class in classify(head, model_name):
        _exchange(part, fused_class)
        part.fused = state  # type: ignore[assignment]


def classify(head: nn.Module | None, model_name: str) -> list[tuple[nn.Module, type[FusedHead]]]:
    """The modules to patch in a head, each with the class it gets; raises ``ValueError`` for what is not supported."""
    if isinstance(head, FusedHead):
        return [(head, type(head))]
    if type(head) is nn.Linear:
        if hasattr(head.weight, "device_mesh"):
            raise ValueError(
                f"the head of {model_name} is sharded (tp_plan, or FSDP before patching): patch the model before FSDP "
                "shards it; tensor parallelism of transformers is not supported, load the model without tp_plan"
            )
        if "forward" in vars(head) and not hasattr(head, "_hf_hook"):
            raise ValueError(f"the head of {model_name} has a forward of its own: undo what replaced it first")
        return [(head, FusedLinear)]
    if head is not None and type(head).__module__.startswith("peft."):
        return _classify_peft(head, model_name)
    kind = "none" if head is None else f"{type(head).__module__}.{type(head).__qualname__}"
    raise ValueError(
        f"model {model_name} must have a plain torch.nn.Linear as output embeddings, got {kind}: a head that is "
        "quantised (keep it out with llm_int8_skip_modules=['lm_head']), sharded before patching or not linear is "
        "not supported"
    )


def _classify_peft(head: nn.Module, model_name: str) -> list[tuple[nn.Module, type[FusedHead]]]:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    from .lora import FusedLoraLinear

    if isinstance(head, ModulesToSaveWrapper):
        parts = (head.original_module, *head.modules_to_save.values())
        return [found for part in parts for found in classify(part, model_name)]
    if type(head) is LoraLinear:
        base = head.base_layer
        if type(base) in (nn.Linear, FusedLinear):
            return [(head, FusedLoraLinear)]
        raise ValueError(
            f"model {model_name} has LoRA around a head of {type(base).__module__}.{type(base).__qualname__}, and "
            "only torch.nn.Linear is supported there: leave a quantised head out of target_modules, or keep it in "
            "16 bit with llm_int8_skip_modules=['lm_head']"
        )
    if type(head).__name__ == "TrainableTokensWrapper":
        raise ValueError(
            f"model {model_name} has rows of its head trained by trainable_token_indices, tied to the embeddings or "
            "not, which the fused loss does not support: train the whole matrix with modules_to_save=['embed_tokens', "
            "'lm_head'] instead"
        )
    raise ValueError(
        f"model {model_name} has a head wrapped by {type(head).__module__}.{type(head).__qualname__}; of PEFT, LoRA "
        "(lora.Linear) and modules_to_save are supported on the head: leave it out of target_modules"
    )


def unfuse(part: FusedHead) -> None:
    """Give a patched module its class back."""
    if type(part).__dict__.get("plain_class") is None:
        raise ValueError(f"the head's class was changed to {type(part).__name__} after apply_fused_loss: undo that")
    plain = type(part).plain_class
    del part.fused
    _exchange(part, plain)


def _exchange(part: nn.Module, new_class: type[nn.Module]) -> None:
    part.__class__ = new_class
    if "_old_forward" in vars(part):  # accelerate's hooks keep the bound forward
        part._old_forward = functools.partial(new_class.forward, part)  # type: ignore[assignment]
