"""One rank of a training with TaskWeightedTrainerMixin, started by torchrun: OUTPUT_DIRECTORY."""

import os
import sys
from pathlib import Path

import torch
from hf_models import build
from test_huggingface_trainer import LAM, WeightedTrainer, collate, parameters, train

from cotbal_kernels.huggingface import apply_fused_loss

torch.set_num_threads(1)
out = Path(sys.argv[1])
trainer = train(WeightedTrainer, apply_fused_loss(build("llama"), LAM), out, 2, 2, collate)
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    torch.save((parameters(trainer), trainer.state.log_history[:5]), out / "result.pt")
torch.distributed.destroy_process_group()
# Threads of native libraries can abort an ordinary exit ("terminate called without an active exception").
os._exit(0)
