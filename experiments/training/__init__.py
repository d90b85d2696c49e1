"""What `experiments.finetune` is made of: its stages, their loop, and what people see of them."""
