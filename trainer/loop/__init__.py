"""The inside of one training: the step, what is measured around it, and what is written while it runs."""
