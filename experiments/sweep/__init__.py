"""Many runs of finetune that differ in some settings."""
