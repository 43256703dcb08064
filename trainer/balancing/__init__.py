"""Task-balancing methods. CoTBal's static weights are in `trainer.balancing.cotbal`."""
