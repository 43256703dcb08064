"""The reference trainer of CoTBal: from task data sets and a pretrained LMM to a balanced model and a report."""
