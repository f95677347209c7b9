"""AdamW as the trainings use it: its groups, and the schedule of the text models."""

import torch

from textrec.training.strategies import DistributedModule


def adamw(module: DistributedModule, training) -> torch.optim.AdamW:
    """Return AdamW by `learning_rate`, `adam_betas` and `weight_decay`, which spares vectors (biases, norms).

    Every trainable parameter is in exactly one group; a group without parameters is left out.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.adam_betas, fused=True)


def adamw_with_linear_decay(module: DistributedModule, training, total_steps: int, first_step: int = 0, state=None):
    """Return what Lightning wants of `configure_optimizers`; decay spares vectors (biases, norms).

    The rate grows over `warmup_steps` to `learning_rate` and falls linearly to zero at `total_steps`. `first_step` and
    an optimizer's `state` continue an earlier training.
    """
    optimizer = adamw(module, training)
    if state is not None:
        optimizer.load_state_dict(state)

    def factor(step: int) -> float:
        step += first_step
        if step < training.warmup_steps:
            return (step + 1) / training.warmup_steps
        return max(0.0, 1.0 - (step - training.warmup_steps) / max(total_steps - training.warmup_steps, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
